"""Texts to passage states: the offline half of the model.

Three steps, each callable alone: `tokenise` (CPU), `forward` (device), and pooling to float32 on
the CPU, joined by `encode_batch`. The encoder knows nothing of files, shards or tables.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kalm_encoder import checkpoint
from kalm_encoder.batching import plan_batches
from kalm_encoder.errors import CheckpointError, InputError
from kalm_encoder.pooling import PassageStates, mean_pool, num_groups
from kalm_encoder.prompts import render_passage

logger = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 1024
GPU_TOKEN_BUDGET = 65536
MAX_PADDING = 0.1
"""Largest share of padding in a batch: a large budget alone would put long and short together."""


@dataclass(frozen=True, slots=True)
class PassageTokens:
    """Token ids of one rendered passage, cut to max_length, and whether it was cut."""

    ids: list[int]
    truncated: bool


class PassageEncoder:
    """The text encoder of one checkpoint on one device.

    Attributes:
        model: the text encoder, in eval mode.
        max_length: tokens a passage is cut to, its prefix included.
        token_budget: tokens, padding included, that one forward takes at most (one passage always
            goes).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int = 1024,
        token_budget: int | None = None,
    ) -> None:
        check_max_length(max_length, tokenizer, model.config)
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        default = CPU_TOKEN_BUDGET if self.device.type == "cpu" else GPU_TOKEN_BUDGET
        self.token_budget = default if token_budget is None else token_budget
        if self.token_budget < 1:
            raise InputError(f"token_budget {token_budget} must be at least 1")

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
    ) -> PassageEncoder:
        """Load the text encoder of a hub id or a local directory, and nothing else of it.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, damaged or no KaLM reranker.
            InputError: an impossible device, dtype or length.
        """
        files = checkpoint.resolve(model_name_or_path, revision)
        place = checkpoint.choose_device(device)
        model = files.load_text_encoder(place, checkpoint.choose_dtype(dtype, place))
        return cls(model, files.tokenizer(), max_length=max_length, token_budget=token_budget)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self.model.device
        return device

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
        encoded: list[tuple[int, PassageStates]] = []
        for batch in self.batches([len(t.ids) for t in tokens]):
            states = self.encode_batch([tokens[i] for i in batch], ratio=ratio)
            encoded.extend(zip(batch, states, strict=True))
        return [states for _, states in sorted(encoded, key=lambda pair: pair[0])]

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group passages of these lengths in tokens, as `encode` does: indices into `lengths`."""
        return plan_batches(lengths, self.token_budget, max_padding=MAX_PADDING)

    def encode_batch(self, tokens: Sequence[PassageTokens], *, ratio: int) -> list[PassageStates]:
        """Encode one padded batch; when memory runs out, its halves, down to single passages.

        Raises:
            torch.OutOfMemoryError: one passage alone does not fit.
        """
        try:
            pooled = self._pooled(tokens, ratio)
        except (torch.OutOfMemoryError, MemoryError):
            if len(tokens) == 1:
                raise
            half = len(tokens) // 2
            logger.warning("out of memory on %d passages: trying %d at a time", len(tokens), half)
        else:
            return [
                PassageStates(row[: num_groups(len(t.ids), ratio)], len(t.ids), t.truncated)
                for row, t in zip(pooled, tokens, strict=True)
            ]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        first = self.encode_batch(tokens[:half], ratio=ratio)
        return first + self.encode_batch(tokens[half:], ratio=ratio)

    @torch.inference_mode()
    def forward(self, batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the text encoder.

        Args:
            batch: b lists of token ids, none empty.

        Returns:
            (b, n, d) last hidden states after the final norm, and the (b, n) bool mask of real
            tokens, both on the device.
        """
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        longest = max(len(ids) for ids in batch)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor(
            [[*ids, *[pad] * (longest - len(ids))] for ids in batch], device=self.device
        )
        mask = torch.arange(longest, device=self.device) < lengths.unsqueeze(1)
        hidden = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden, mask

    @torch.inference_mode()
    def _pooled(self, tokens: Sequence[PassageTokens], ratio: int) -> Any:
        """Return (b, m, d) float32 on the CPU, as a numpy array."""
        hidden, mask = self.forward([t.ids for t in tokens])
        return mean_pool(hidden, mask, ratio).cpu().numpy()


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
