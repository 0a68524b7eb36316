"""Turns texts into passage states: the offline half of the model.

`tokenise` runs on the CPU, `forward` and pooling run on the device, and only pooled states leave
it. On a GPU `start` returns at once, so that the device never waits for the host between batches.
The encoder knows nothing of files, shards or tables.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_encoder.errors import CheckpointError, InputError
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.model.batching import Packed, fetch, make_packed_batches, send
from kalm_encoder.model.checkpoint import Device, Dtype, ModelName, resolve
from kalm_encoder.model.encoder_forward import PackedForward
from kalm_encoder.model.in_flight import BatchInFlight, PassageTokens, mark
from kalm_encoder.model.pooling import pool_packed, within
from kalm_encoder.model.tokens import FlatIds, check_max_length, fast_passage_ids, passage_ids
from kalm_encoder.process import check_process

logger = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 512
"""Tokens of a forward on a CPU. Each thread runs its own forward: 1,024 tokens were measured to be
4 % slower per token, and 2,048 tokens 12 %."""
GPU_TOKEN_BUDGET = 65536
"""Most tokens of a forward on a GPU; a GPU with little free memory gets fewer."""
MEMORY_SHARE = 0.8
"""Largest share of a GPU's free memory that a forward may take."""
PROBE_TOKENS = 4096
"""Tokens of the forward that measures the memory per token on a GPU."""


class PassageEncoder:
    """The text encoder of one checkpoint on one device. No other part of the model is loaded.

    Several threads may use it at once.

    Args:
        model_name_or_path: Hub id, directory, `kalm-demo`, or a Checkpoint.
        revision: Revision of a hub id.
        device: None takes the first GPU, or the CPU if there is none.
        dtype: None takes bfloat16 on a GPU that computes in it, and float32 elsewhere.
        max_length: Number of tokens that a passage is cut to, with its prefix.
        token_budget: Most tokens of one forward; a single passage may have more. None chooses it
            from the device and its free memory. If memory runs out, it is halved for the rest of
            the encoder's life.

    Attributes:
        model: The text encoder in eval mode. `PackedForward` changes its layers.
        num_computed: Number of tokens computed so far by all threads, about.

    Raises:
        CheckpointError: If the model is missing, incomplete, damaged or not a KaLM reranker.
        InputError: If the device, the dtype or a length is impossible.
    """

    def __init__(
        self,
        model_name_or_path: ModelName,
        *,
        revision: str | None = None,
        device: Device = None,
        dtype: Dtype = None,
        max_length: int = 1024,
        token_budget: int | None = None,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise InputError(f"token_budget {token_budget} must be at least 1")
        files = resolve(model_name_or_path, revision)
        self.model = files.load_text_encoder(device, dtype)
        self.tokenizer = files.tokenizer()
        check_max_length(max_length, self.tokenizer, self.model.config)
        self._ids: Callable[[Sequence[str]], FlatIds] = partial(passage_ids, self.tokenizer)
        self.max_length = max_length
        self.device: torch.device = self.model.embed_tokens.weight.device
        self._forward = PackedForward(self.model)
        self._loaded = mark(self.device)
        self._last = threading.local()
        self.num_computed = 0
        self.token_budget = token_budget or (
            CPU_TOKEN_BUDGET if self.device.type == "cpu" else self._fitting_budget()
        )

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype in which this encoder computes."""
        return str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")

    def __reduce__(self) -> str:
        raise InputError("a PassageEncoder cannot be pickled: make one in the other process")

    def tokenise(self, texts: Sequence[str]) -> list[PassageTokens]:
        """Render and tokenise passages, and cut each to max_length.

        No special token is added, so cutting the ids equals the reference's `truncation=True`. It
        also tells which passages were cut.

        Raises:
            CheckpointError: If the tokenizer makes tokens that the model does not have.
        """
        check_process()
        flat, lengths = self._ids(texts)
        vocabulary, top = self.model.config.vocab_size, flat.max(initial=0)
        if top >= vocabulary:
            raise CheckpointError(
                f"the tokenizer made token {top}, but the model has {vocabulary} tokens: they do "
                "not belong together"
            )
        most, sizes = self.max_length, lengths.tolist()
        return [
            PassageTokens(flat[end - n : end][:most], n > most)
            for n, end in zip(sizes, accumulate(sizes), strict=True)
        ]

    def use_fast_tokenizer(self) -> None:
        """Tokenise with fastokens from now on, if it is there and gives the same ids.

        With the published tokenizer this takes six seconds of a CPU and 360 MB.
        """
        self._ids = fast_passage_ids(self.tokenizer) or self._ids

    def encode(self, texts: Sequence[str], *, ratio: int = 4) -> list[PassageStates]:
        """Encode passages.

        Args:
            texts: Raw passages, with the title already joined. The empty passage is legal.
            ratio: Number of tokens that are averaged into one state, the paper's r.

        Returns:
            One PassageStates per text, in input order. The states are float32.
        """
        if ratio < 1:
            raise InputError(f"ratio {ratio} must be at least 1")
        batches = self.batches(self.tokenise(texts))
        started = [part for batch in batches for part in self.start(batch, ratio=ratio)]
        return [states for part in started for states in part.result()[0].unpack(ratio)]

    def batches(self, tokens: Sequence[PassageTokens]) -> list[list[PassageTokens]]:
        """Return the batches in which `encode` sends passages to the device, in input order."""
        groups = make_packed_batches([len(t.ids) for t in tokens], self.token_budget)
        return [[tokens[i] for i in group] for group in groups]

    def encode_batch(self, tokens: Sequence[PassageTokens], *, ratio: int) -> list[PassageStates]:
        """Encode one batch; see `start`."""
        started = self.start(tokens, ratio=ratio)
        return [states for part in started for states in part.result()[0].unpack(ratio)]

    def start(
        self,
        tokens: Sequence[PassageTokens],
        *,
        ratio: int,
        dtype: torch.dtype = torch.float32,
        limit: float = math.inf,
    ) -> list[BatchInFlight]:
        """Send a batch to the device; on a GPU, return without waiting for the result.

        If memory runs out, the token budget is halved for this batch and all later ones, and the
        batch is sent in parts.

        Args:
            tokens: Passages, at least one.
            ratio: Number of tokens that are averaged into one state.
            dtype: Dtype in which states leave the device. The sums are float32.
            limit: Largest magnitude of a state that can be stored; the device checks it before it
                casts.

        Returns:
            The parts of the batch, in order; usually there is one.

        Raises:
            torch.OutOfMemoryError: If a single passage does not fit.
        """
        total = sum(len(t.ids) for t in tokens)
        if len(tokens) == 1 or total <= self.token_budget:
            try:
                return [self._start(tokens, ratio, dtype, limit)]
            except (torch.OutOfMemoryError, MemoryError):
                if len(tokens) == 1:
                    raise
            # This is outside the handler, because its traceback would keep the tensors alive.
            self.token_budget = max(1, total // 2)
            logger.warning(
                "out of memory on %d tokens: a forward takes %d from now on",
                total,
                self.token_budget,
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        half, again = len(tokens) // 2, partial(self.start, ratio=ratio, dtype=dtype, limit=limit)
        return again(tokens[:half]) + again(tokens[half:])

    @torch.inference_mode()
    def forward(self, batch: Sequence[NDArray[np.int64]]) -> tuple[torch.Tensor, Packed]:
        """Run the text encoder.

        Args:
            batch: Token ids of each passage, none empty, T tokens in all.

        Returns:
            (T, d) last hidden states after the final norm, and where each passage lies in them.
        """
        ids = send(np.concatenate(batch), self.device)
        packed = Packed([len(passage) for passage in batch], self.device)
        return self._forward(ids, packed), packed

    @torch.inference_mode()
    def _start(
        self, tokens: Sequence[PassageTokens], ratio: int, dtype: torch.dtype, limit: float
    ) -> BatchInFlight:
        began = mark(self.device)
        hidden, packed = self.forward([t.ids for t in tokens])
        forwarded = mark(self.device)
        states = pool_packed(hidden, packed, ratio)
        pooled = fetch(states.to(dtype)), fetch(within(states, limit))
        before = getattr(self._last, "ended", self._loaded)
        marks = (before, began, forwarded, mark(self.device))
        self._last.ended = marks[-1]
        self.num_computed += len(hidden)
        return BatchInFlight(tokens, len(hidden), ratio, pooled, marks)

    @torch.inference_mode()
    def _fitting_budget(self) -> int:
        """Measure the peak memory of a small batch and return how many tokens fit this GPU."""
        length = min(self.max_length, PROBE_TOKENS)
        probe = [np.zeros(length, np.int64)] * (PROBE_TOKENS // length)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        pool_packed(*self.forward(probe), 1)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * total
        ours = min(free, allowed - torch.cuda.memory_allocated(self.device))
        return token_budget(ours, peak / (length * len(probe)), self.max_length)


def token_budget(free_bytes: float, bytes_per_token: float, max_length: int) -> int:
    """Return how many tokens of a forward a GPU's free memory holds, at least one passage.

    Example: 60 GB of free memory hold 160,000 tokens of 300 kB; the result is GPU_TOKEN_BUDGET.
    """
    fitting = int(MEMORY_SHARE * free_bytes / bytes_per_token)
    return max(max_length, min(GPU_TOKEN_BUDGET, fitting))
