"""A query and stored passage states to scores: the online half of the model.

Pairs whose prompts have one length go through the decoder together, so prompts are never padded;
only stored states are, among neighbours in length. Of the LM head two rows at one position are
computed: P(yes) needs no more. The decoder knows nothing of tables.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kalm_encoder.errors import InputError, NonFiniteError
from kalm_encoder.model import checkpoint
from kalm_encoder.model.batching import make_batches
from kalm_encoder.model.compiled_forward import PROMPT_STEP, CompiledForward
from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden
from kalm_encoder.model.hot_passages import HotPassages
from kalm_encoder.model.pairs import Pair, Prompt, memory_of
from kalm_encoder.prompts import DEFAULT_INSTRUCTION, before_query, render_query

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
__all__ = ["Pair", "Prompt", "QueryDecoder"]
CPU_TOKEN_BUDGET = 4096
GPU_TOKEN_BUDGET = 131072
MAX_PADDING = 0.05
"""Largest share of padding among the prompt tokens and states of a batch that is not compiled."""


class QueryDecoder:
    """The decoder of one checkpoint on one device.

    Attributes:
        model: the decoder, in eval mode; its embedding is the LM head too.
        query_max_length: tokens the raw query is cut to before it goes into the prompt.
        token_budget: prompt tokens plus states, padding included, of one forward.
        fingerprint: of the checkpoint the weights come from; a table must record the same.
        hot: the memory of repeated passages, or None.
        compiled: the forward through torch.compile, or None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        fingerprint: str,
        query_max_length: int = 512,
        token_budget: int | None = None,
        hot_bytes: int = 0,
        compile: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.query_max_length = query_max_length
        default = CPU_TOKEN_BUDGET if self.device.type == "cpu" else GPU_TOKEN_BUDGET
        self.token_budget = default if token_budget is None else token_budget
        if compile and hot_bytes:
            raise InputError("compile and hot_bytes cannot be combined: choose one")
        self.hot = HotPassages(hot_bytes) if hot_bytes else None
        self.compiled = CompiledForward(model, self.token_budget) if compile else None
        answers = [checkpoint.answer_token_id(tokenizer, answer) for answer in ("yes", "no")]
        self._answers = model.embed_tokens.weight[answers].float()  # (2, d)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        query_max_length: int = 512,
        token_budget: int | None = None,
        hot_bytes: int = 0,
        compile: bool = False,
    ) -> QueryDecoder:
        """Load the decoder of a hub id or a local directory, and nothing else of it.

        With `compile` the forward goes through torch.compile: batches are padded to a few shapes,
        and the first one waits for the compiler, or `warm_up` does.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, damaged or no KaLM reranker, or
                its tokenizer splits `yes` or `no`.
            InputError: an impossible device or dtype, or `compile` with `hot_bytes`.
        """
        files = checkpoint.resolve(model_name_or_path, revision)
        place = checkpoint.choose_device(device)
        model = files.load_decoder(place, checkpoint.choose_dtype(dtype, place))
        return cls(
            model,
            files.tokenizer(),
            fingerprint=files.fingerprint,
            query_max_length=query_max_length,
            token_budget=token_budget,
            hot_bytes=hot_bytes,
            compile=compile,
        )

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self.model.device
        return device

    @property
    def dim(self) -> int:
        """Width d of the states this decoder attends to."""
        return int(self.model.config.hidden_size)

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """Return the decoder prompt of a query.

        As in the reference, the raw query is tokenised, cut, decoded and only then inserted.
        """
        instruction = DEFAULT_INSTRUCTION if instruction is None else instruction
        ids = self._tokens(query)[: self.query_max_length]
        cut = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        tokens = self._tokens(render_query(cut, instruction))
        shared = self._tokens(before_query(instruction))
        # A tokenizer may join the end of the beginning with the query: then nothing is shared.
        prefix = len(shared) if tokens[: len(shared)] == shared else 0
        return Prompt(tuple(tokens), prefix)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def recall(self, prompt: Prompt, key: Hashable) -> torch.Tensor | None:
        """Return what is kept of a passage for prompts that begin like this one, if anything is."""
        if self.hot is None or not prompt.prefix:
            return None
        return self.hot.get((key, prompt.ids[: prompt.prefix]))

    def score(
        self,
        query: str,
        states: Sequence[NDArray[np.floating]],
        *,
        instruction: str | None = None,
    ) -> list[tuple[float, float]]:
        """Score passages against one query.

        Args:
            query: raw text; cut to `query_max_length` tokens.
            states: one (m, d) array a passage, m >= 1 and different for each.
            instruction: the task; None takes the default one.

        Returns:
            (score, margin) a passage, in input order: score = P(yes) in [0, 1], margin = the logit
            of `yes` minus that of `no`. A pair's score does not depend on the other passages.

        Raises:
            InputError: states that are not (m, d) with this decoder's d.
            NonFiniteError: the logits overflowed.
        """
        prompt = self.prompt(query, instruction)
        return self.score_pairs([Pair(prompt, array) for array in states])

    @torch.inference_mode()
    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Score any pairs, as `score` does: prompts may differ."""
        alike = defaultdict(list)
        for i, pair in enumerate(pairs):
            if not self._fits(pair.passage):
                raise InputError(
                    f"states[{i}] has shape {tuple(pair.passage.shape)}; this decoder takes "
                    f"(m, {self.dim})"
                )
            alike[len(pair.prompt.ids), pair.prompt.prefix, pair.held].append(i)
        scores: list[tuple[float, float]] = [(0.0, 0.0)] * len(pairs)
        for (length, _, held), members in alike.items():
            sizes = [pairs[i].num_states for i in members]
            for batch in self._plan(sizes, length - held):
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

    def _plan(self, sizes: Sequence[int], length: int) -> list[list[int]]:
        if self.compiled is not None:
            return self.compiled.plan(sizes, length)
        return make_batches(sizes, self.token_budget, overhead=length, max_padding=MAX_PADDING)

    def warm_up(self) -> None:
        """Compile for queries of up to 64 tokens, in this thread; without `compile` do nothing.

        Raises:
            InputError: torch cannot compile here.
        """
        if self.compiled is None:
            return
        began, shortest = time.monotonic(), len(self.prompt("").ids)
        shapes = self.compiled.warm_up([shortest, shortest + PROMPT_STEP, shortest + 64])
        logger.info("compiled, %d shapes met, %.1f s", shapes, time.monotonic() - began)

    def forward(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Run the decoder on b pairs whose prompts have one length, all recalled or none.

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

    def _fits(self, passage: NDArray[np.floating] | torch.Tensor) -> bool:
        if isinstance(passage, torch.Tensor):
            return True
        return passage.ndim == 2 and len(passage) > 0 and passage.shape[1] == self.dim
