"""Texts to passage states: the offline half of the model.

Three steps: `tokenise` (CPU), `forward` and pooling (device; only pooled states leave it). `start`
sends a batch to the device and returns at once where that is a GPU, so that it never waits for the
host between batches. The encoder knows nothing of files, shards or tables.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from kalm_encoder.errors import CheckpointError, InputError
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.model import checkpoint
from kalm_encoder.model.batching import make_packed_batches
from kalm_encoder.model.encoder_forward import PackedForward
from kalm_encoder.model.in_flight import BatchInFlight, PassageTokens, mark
from kalm_encoder.model.packing import Packed, send
from kalm_encoder.model.pooling import pool_packed
from kalm_encoder.prompts import render_passage

logger = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 512
"""Fastest where a thread has a forward of its own: 1,024 are 4 % slower, 2,048 12 % (measured)."""
GPU_TOKEN_BUDGET = 65536
"""The most tokens of a forward on a GPU; less where its free memory holds less."""
MEMORY_SHARE = 0.8
"""Of a GPU's free memory that a forward may take."""
PROBE_TOKENS = 4096


class PassageEncoder:
    """The text encoder of one checkpoint on one device.

    Several threads may use it at once.

    Attributes:
        model: the text encoder, in eval mode; taken over, see `PackedForward`.
        max_length: tokens a passage is cut to, its prefix included.
        token_budget: tokens that one forward takes at most (one passage always goes). Chosen by
            device and free memory unless given; halved for good when memory runs out.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int = 1024,
        token_budget: int | None = None,
        compile: bool = False,
    ) -> None:
        check_max_length(max_length, tokenizer, model.config)
        if token_budget is not None and token_budget < 1:
            raise InputError(f"token_budget {token_budget} must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.device: torch.device = model.embed_tokens.weight.device
        self._forward = PackedForward(model, compile=compile)
        self._loaded = mark(self.device)
        self._last = threading.local()
        self.token_budget = token_budget or (
            CPU_TOKEN_BUDGET if self.device.type == "cpu" else self._fitting_budget()
        )

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int = 1024,
        token_budget: int | None = None,
        compile: bool = False,
    ) -> PassageEncoder:
        """Load the text encoder of a hub id or a local directory, and nothing else of it.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, damaged or no KaLM reranker.
            InputError: an impossible device, dtype or length.
        """
        files = checkpoint.resolve(model_name_or_path, revision)
        place = checkpoint.choose_device(device)
        return cls(
            files.load_text_encoder(place, checkpoint.choose_dtype(dtype, place)),
            files.tokenizer(),
            max_length=max_length,
            token_budget=token_budget,
            compile=compile,
        )

    def tokenise(self, texts: Sequence[str]) -> list[PassageTokens]:
        """Render and tokenise passages, cutting each to max_length.

        Tokenising first and cutting the ids equals the reference's `truncation=True` (no special
        token is added), and tells which passages were cut.
        """
        encoded = passage_ids(self.tokenizer, texts)
        vocabulary = self.model.config.vocab_size
        top = max((max(ids) for ids in encoded), default=0)
        if top >= vocabulary:
            raise CheckpointError(
                f"the tokenizer made token {top}, the model has {vocabulary}: they do not belong "
                "together"
            )
        return [PassageTokens(i[: self.max_length], len(i) > self.max_length) for i in encoded]

    def encode(self, texts: Sequence[str], *, ratio: int = 4) -> list[PassageStates]:
        """Encode passages.

        Args:
            texts: raw passages, title already joined; the empty one is legal.
            ratio: tokens averaged into one state, the paper's r.

        Returns:
            One PassageStates a text, in input order; states (ceil(num_tokens / ratio), d) float32.
        """
        if ratio < 1:
            raise InputError(f"ratio {ratio} must be at least 1")
        tokens = self.tokenise(texts)
        started: list[BatchInFlight] = []
        for batch in self.batches([len(t.ids) for t in tokens]):
            started += self.start([tokens[i] for i in batch], ratio=ratio)
        return [states for batch in started for states in batch.result()]

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group passages of these lengths in tokens, as `encode` does: indices, in order."""
        return make_packed_batches(lengths, self.token_budget)

    def encode_batch(self, tokens: Sequence[PassageTokens], *, ratio: int) -> list[PassageStates]:
        """Encode one batch; see `start`."""
        return [states for batch in self.start(tokens, ratio=ratio) for states in batch.result()]

    def start(self, tokens: Sequence[PassageTokens], *, ratio: int) -> list[BatchInFlight]:
        """Send a batch to the device, and on a GPU do not wait for it.

        Where memory runs out the token budget is halved, for this batch and all later ones, and
        the batch goes in parts.

        Returns:
            What becomes the states of all passages, in order; usually one.

        Raises:
            torch.OutOfMemoryError: one passage alone does not fit.
        """
        total = sum(len(t.ids) for t in tokens)
        if len(tokens) == 1 or total <= self.token_budget:
            try:
                return [self._start(tokens, ratio)]
            except (torch.OutOfMemoryError, MemoryError):
                if len(tokens) == 1:
                    raise
            # Outside of the handler, whose traceback would hold on to the tensors.
            self.token_budget = max(1, total // 2)
            logger.warning(
                "out of memory on %d tokens: from now on %d at a time", total, self.token_budget
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        half = len(tokens) // 2
        return self.start(tokens[:half], ratio=ratio) + self.start(tokens[half:], ratio=ratio)

    @torch.inference_mode()
    def forward(self, batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packed]:
        """Run the text encoder.

        Args:
            batch: lists of token ids, none empty, T tokens in all.

        Returns:
            (T, d) last hidden states after the final norm, on the device, and where they lie.
        """
        ids, packed = self._send(batch)
        return self._forward(ids, packed), packed

    def _send(self, batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packed]:
        ids = send([i for passage in batch for i in passage], self.device)
        return ids, Packed([len(passage) for passage in batch], self.device)

    @torch.inference_mode()
    def _start(self, tokens: Sequence[PassageTokens], ratio: int) -> BatchInFlight:
        ids, packed = self._send([t.ids for t in tokens])
        began = mark(self.device)
        hidden = self._forward(ids, packed)
        forwarded = mark(self.device)
        pooled = pool_packed(hidden, packed, ratio)
        if self.device.type == "cuda":
            there = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
            pooled = there.copy_(pooled, non_blocking=True)
        before = getattr(self._last, "ended", self._loaded)
        marks = (before, began, forwarded, mark(self.device))
        self._last.ended = marks[-1]
        return BatchInFlight(tokens, ratio, pooled, len(hidden), marks)

    @torch.inference_mode()
    def _fitting_budget(self) -> int:
        """Return how many tokens fit into this GPU's free memory, by the peak of a small batch."""
        length = min(self.max_length, PROBE_TOKENS)
        probe = [[self.tokenizer.pad_token_id] * length] * (PROBE_TOKENS // length)
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
    """Return the tokens of a forward that a GPU's free memory holds: a passage at least.

    Example: 60 GB free at 300 kB a token hold 160,000 tokens; GPU_TOKEN_BUDGET is enough.
    """
    fitting = int(MEMORY_SHARE * free_bytes / bytes_per_token)
    return max(max_length, min(GPU_TOKEN_BUDGET, fitting))


def passage_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each rendered passage, not cut."""
    if not texts:
        return []  # a tokenizer fails on none
    rendered = [render_passage(text) for text in texts]
    encoded: list[list[int]] = tokenizer(
        rendered, add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return encoded


def check_max_length(max_length: int, tokenizer: Any, text_config: Any) -> None:
    """Refuse a passage length that holds no passage or that the model has no positions for.

    Raises:
        InputError: with both limits.
    """
    limit = int(text_config.max_position_embeddings)
    shortest = len(tokenizer(render_passage(""), add_special_tokens=False)["input_ids"])
    if not shortest < max_length <= limit:
        raise InputError(
            f"max_length {max_length} must be above {shortest} (the tokens of the passage "
            f"prefix) and at most {limit} (the model's positions)"
        )
