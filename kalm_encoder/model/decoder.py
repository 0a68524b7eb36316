"""Turns a query and stored passage states into scores: the online half of the model.

Pairs whose prompts have the same length go through the decoder together. Prompts are therefore
never padded; only stored states are, next to others of similar length. Only two rows of the LM head
are computed at one position, because P(yes) needs no more. The decoder knows nothing of tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_encoder.errors import InputError, NonFiniteError
from kalm_encoder.model.batching import make_batches
from kalm_encoder.model.checkpoint import Checkpoint, Device, Dtype, answer_token_id, resolve
from kalm_encoder.model.compiled_forward import CompiledForward
from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden
from kalm_encoder.model.pairs import HotPassages, Pair, Prompt, memory_of
from kalm_encoder.process import check_process
from kalm_encoder.prompts import (
    DEFAULT_INSTRUCTION,
    DEFAULT_SYSTEM_INSTRUCTION,
    before_query,
    render_query,
)

CPU_TOKEN_BUDGET = 4096
"""Most prompt tokens plus states of a forward on a CPU."""
GPU_TOKEN_BUDGET = 131072
"""Most prompt tokens plus states of a forward on a GPU."""
MAX_PADDING = 0.05
"""Largest share of padding among the prompt tokens and states of a batch that is not compiled."""
QUERY_MAX_TOKENS = 512
"""Tokens that a raw query is cut to, without the prompt around it, as the reference does."""


class QueryDecoder:
    """The decoder of one checkpoint on one device. No other part of the model is loaded.

    Args:
        model_name_or_path: Hub id, directory, `kalm-demo`, or a Checkpoint.
        revision: Revision of a hub id.
        device: None takes the first GPU, or the CPU if there is none.
        dtype: None takes bfloat16 on a GPU and float32 on a CPU.
        token_budget: Most prompt tokens plus states of one forward, with padding. None chooses it
            from the device.
        hot_bytes: Most memory for repeated passages; see pairs.py. 0 keeps none.
        compile: Whether the forward goes through torch.compile. Batches are then padded to a few
            shapes, and the first one waits for the compiler unless `warm_up` ran before.

    Attributes:
        model: The decoder in eval mode; its embedding is also the LM head.
        fingerprint: Fingerprint of the checkpoint. A table must record the same.
        dim: Width d of the states that this decoder attends to.
        hot: Memory of repeated passages, or None.
        compiled: Forward through torch.compile, or None.

    Raises:
        CheckpointError: If the model is missing, incomplete, damaged or not a KaLM reranker.
        InputError: If the device or the dtype is impossible, or `compile` is combined with
            `hot_bytes`.
    """

    def __init__(
        self,
        model_name_or_path: str | Checkpoint,
        *,
        revision: str | None = None,
        device: Device = None,
        dtype: Dtype = None,
        token_budget: int | None = None,
        hot_bytes: int = 0,
        compile: bool = False,
    ) -> None:
        if compile and hot_bytes:
            raise InputError("compile and hot_bytes cannot be combined: choose one")
        files = resolve(model_name_or_path, revision)
        self.model = files.load_decoder(device, dtype)
        self.tokenizer = files.tokenizer()
        self.fingerprint = files.fingerprint
        self.device: torch.device = self.model.device
        self.dim = int(self.model.config.hidden_size)
        default = CPU_TOKEN_BUDGET if self.device.type == "cpu" else GPU_TOKEN_BUDGET
        self.token_budget = default if token_budget is None else token_budget
        self.hot = HotPassages(hot_bytes) if hot_bytes else None
        self.compiled = CompiledForward(self.model, self.token_budget) if compile else None
        answers = [answer_token_id(self.tokenizer, answer) for answer in ("yes", "no")]
        self._answers = self.model.embed_tokens.weight[answers].float()  # (2, d)

    def prompt(
        self, query: str, instruction: str | None = None, system_instruction: str | None = None
    ) -> Prompt:
        """Return the decoder prompt of a query; an instruction that is None is the default one.

        As in the reference, the raw query is tokenised, cut, decoded and only then inserted.
        """
        check_process()
        task = DEFAULT_INSTRUCTION if instruction is None else instruction
        system = DEFAULT_SYSTEM_INSTRUCTION if system_instruction is None else system_instruction
        ids = self._tokens(query)[:QUERY_MAX_TOKENS]
        cut = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        tokens = self._tokens(render_query(cut, task, system))
        shared = self._tokens(before_query(task, system))
        # A tokenizer may merge the last token of the beginning with the query: then prompts of
        # these instructions have no common beginning.
        prefix = len(shared) if tokens[: len(shared)] == shared else 0
        return Prompt(tuple(tokens), prefix)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def recall(self, prompt: Prompt, key: Hashable) -> torch.Tensor | None:
        """Return what is kept of a passage for prompts with this beginning, or None."""
        if self.hot is None or not prompt.prefix:
            return None
        return self.hot.get((key, prompt.ids[: prompt.prefix]))

    def score(
        self,
        query: str,
        states: Sequence[NDArray[np.floating]],
        *,
        instruction: str | None = None,
        system_instruction: str | None = None,
    ) -> list[tuple[float, float]]:
        """Score passages against one query.

        Args:
            query: Raw text; it is cut to QUERY_MAX_TOKENS tokens.
            states: An (m, d) array per passage; m >= 1 may differ between passages.
            instruction: Description of the task; None takes the default one.
            system_instruction: What the model is told before the task; None takes the default.

        Returns:
            (score, margin) per passage, in input order: the score is P(yes) in [0, 1], the margin
            is the logit of `yes` minus that of `no`. A pair's score does not depend on the others.

        Raises:
            InputError: If states are not (m, d) with this decoder's d.
            NonFiniteError: If the logits overflowed.
        """
        prompt = self.prompt(query, instruction, system_instruction)
        return self.score_pairs([Pair(prompt, array) for array in states])

    @torch.inference_mode()
    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Score pairs as `score` does; their prompts may differ."""
        alike = defaultdict(list)
        for i, pair in enumerate(pairs):
            shape = tuple(pair.passage.shape)
            recalled = isinstance(pair.passage, torch.Tensor)
            if not recalled and (len(shape) != 2 or not shape[0] or shape[1] != self.dim):
                raise InputError(
                    f"states[{i}] has shape {shape}; this decoder takes (m, {self.dim})"
                )
            alike[len(pair.prompt.ids), pair.prompt.prefix, pair.held].append(i)
        scores: list[tuple[float, float]] = [(0.0, 0.0)] * len(pairs)
        for (length, _, held), members in alike.items():
            sizes = [pairs[i].num_states for i in members]
            for batch in self._make_batches(sizes, length - held):
                chosen = [members[j] for j in batch]
                logits = self.forward([pairs[i] for i in chosen])
                if not torch.isfinite(logits).all():
                    raise NonFiniteError(
                        f"the decoder made non-finite logits in {self.model.dtype}; load it in "
                        "bfloat16 or float32"
                    )
                margins = logits[:, 0] - logits[:, 1]
                found = zip(margins.sigmoid().tolist(), margins.tolist(), strict=True)
                for i, score in zip(chosen, found, strict=True):
                    scores[i] = score
        return scores

    def _make_batches(self, sizes: Sequence[int], length: int) -> list[list[int]]:
        if self.compiled is not None:
            return self.compiled.make_batches(sizes, length)
        return make_batches(sizes, self.token_budget, overhead=length, max_padding=MAX_PADDING)

    def warm_up(self) -> None:
        """Compile for short queries in this thread; do nothing without `compile`.

        Raises:
            InputError: If torch cannot compile on this machine.
        """
        if self.compiled is not None:
            self.compiled.warm_up(len(self.prompt("").ids))

    def forward(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Run the decoder on b pairs with prompts of one length; all are recalled, or none is.

        Returns:
            (b, 2) float32 logits of `yes` and `no` at the last prompt position.
        """
        memory = memory_of(pairs, self.device, self.model.dtype)
        rows = [pair.prompt.ids[memory.prefix :] for pair in pairs]
        if all(row == rows[0] for row in rows):
            rows = rows[:1]
        wanted = self.hot and not memory.prefix and any(pair.key is not None for pair in pairs)
        keep = pairs[0].prompt.prefix if wanted else 0
        tokens = torch.tensor(rows, device=self.device)
        kept = None
        if self.compiled is not None and isinstance(memory, PassageMemory):
            hidden = self.compiled(tokens, memory)
        else:
            hidden, kept = last_hidden(self.model, tokens, memory, keep=keep)
        if kept is not None and self.hot is not None:
            for pair, entry in zip(pairs, kept, strict=True):
                if pair.key is not None:
                    entry = entry[:, :, : keep + len(pair.passage)].clone()
                    self.hot.put((pair.key, pair.prompt.ids[:keep]), entry)
        logits: torch.Tensor = hidden.float() @ self._answers.T
        cap = self.model.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap
