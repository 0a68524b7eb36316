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
from kalm_encoder.model.batching import make_batches, send
from kalm_encoder.model.checkpoint import Checkpoint, Device, Dtype, answer_token_id, resolve
from kalm_encoder.model.cuda_graphs import DecoderGraphs
from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden
from kalm_encoder.model.onednn import pack_linears
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
"""Largest share of padding among the prompt tokens and states of a batch on a CPU. On a GPU there
is no limit: a padded state costs only its key and value, a further forward 400 launches."""
QUERY_MAX_TOKENS = 512
"""Tokens that a raw query is cut to, without the prompt around it, as the reference does."""


class QueryDecoder:
    """The decoder of one checkpoint on one device. No other part of the model is loaded.

    Args:
        model_name_or_path: Hub id, directory, `kalm-demo`, or a Checkpoint.
        revision: Revision of a hub id.
        device: None takes the first GPU, or the CPU if there is none.
        dtype: None takes bfloat16 on a GPU that computes in it, and float32 elsewhere.
        token_budget: Most prompt tokens plus states of one forward, with padding. None chooses it
            from the device.
        hot_bytes: Most memory for repeated passages; see pairs.py. 0 keeps none. Batches with
            passages to keep are launched kernel by kernel on a GPU, without CUDA graphs.

    Attributes:
        model: The decoder in eval mode; its embedding is also the LM head. On a CPU the weights of
            its layers are packed for oneDNN where that is faster.
        files: The checkpoint. It must be the one that made the table.
        dim: Width d of the states that this decoder attends to.
        hot: Memory of repeated passages, or None.
        graphs: CUDA graphs of the forward, or None on a CPU.
        num_computed: Number of prompt tokens and states computed so far, with padding.

    Raises:
        CheckpointError: If the model is missing, incomplete, damaged or not a KaLM reranker.
        InputError: If the device or the dtype is impossible.
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
    ) -> None:
        files = resolve(model_name_or_path, revision)
        self.model = files.load_decoder(device, dtype)
        self.tokenizer = files.tokenizer()
        self.files = files
        self.device: torch.device = self.model.device
        self.dim = int(self.model.config.hidden_size)
        self._on_gpu = self.device.type == "cuda"
        pack_linears(self.model.layers)
        default = GPU_TOKEN_BUDGET if self._on_gpu else CPU_TOKEN_BUDGET
        self.token_budget = default if token_budget is None else token_budget
        self.hot = HotPassages(hot_bytes) if hot_bytes else None
        self.graphs = DecoderGraphs(self.model) if self._on_gpu else None
        self.num_computed = 0
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
            # CUDA graphs are recorded for passages that share one prompt.
            prompt = pair.prompt.ids if self.graphs else ()
            alike[len(pair.prompt.ids), pair.prompt.prefix, pair.held, prompt].append(i)
        order: list[int] = []
        logits: list[torch.Tensor] = []
        for (length, _, held, _), members in alike.items():
            sizes = [pairs[i].num_states for i in members]
            for batch in self._make_batches(sizes, length - held):
                order += (chosen := [members[j] for j in batch])
                logits.append(self.forward([pairs[i] for i in chosen]))
                self.num_computed += len(batch) * (length - held + sizes[batch[0]])
        if not order:
            return []
        found = torch.cat(logits).cpu()  # the only wait for a GPU
        if not torch.isfinite(found).all():
            raise NonFiniteError(
                f"the decoder made non-finite logits in {self.model.dtype}; load it in bfloat16 or "
                "float32"
            )
        margins = torch.empty(len(order))
        margins[order] = found[:, 0] - found[:, 1]
        return list(zip(margins.sigmoid().tolist(), margins.tolist(), strict=True))

    def _make_batches(self, sizes: Sequence[int], length: int) -> list[list[int]]:
        most = 1.0 if self._on_gpu else MAX_PADDING
        return make_batches(sizes, self.token_budget, overhead=length, max_padding=most)

    def warm_up(self) -> None:
        """Compile, and record the CUDA graphs that short queries need; on a CPU, do nothing."""
        if self.graphs is not None:
            self.graphs.record_usual(len(self.prompt("").ids))

    def forward(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Run the decoder on b pairs with prompts of one length; all are recalled, or none is.

        Returns:
            (b, 2) float32 logits of `yes` and `no` at the last prompt position.
        """
        memory = memory_of(pairs, self.device, self.model.dtype)
        prompts = [pair.prompt.ids[memory.prefix :] for pair in pairs]
        if all(prompt == prompts[0] for prompt in prompts):
            prompts = prompts[:1]
        tokens = send(prompts, self.device)
        wanted = self.hot and not memory.prefix and any(pair.key is not None for pair in pairs)
        hidden = None
        if self.graphs and not wanted and len(tokens) == 1 and isinstance(memory, PassageMemory):
            hidden = self.graphs(tokens[0], memory)
        if hidden is None:
            keep = pairs[0].prompt.prefix if wanted else 0
            hidden, kept = last_hidden(self.model, tokens, memory, keep=keep, fuse=self._on_gpu)
            if kept is not None:
                self._keep(pairs, kept, keep)
        logits: torch.Tensor = hidden.float() @ self._answers.T
        cap = self.model.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _keep(self, pairs: Sequence[Pair], kept: torch.Tensor, keep: int) -> None:
        """Remember the passages of a batch that have a key; see `last_hidden`."""
        assert self.hot is not None
        for pair, entry in zip(pairs, kept, strict=True):
            if pair.key is not None:
                own = entry[: keep + len(pair.passage)].clone()
                self.hot.put((pair.key, pair.prompt.ids[:keep]), own)
