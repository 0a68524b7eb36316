"""A query and stored passage states to scores: the online half of the model.

All prompts of one call are the same query, so they have one length and no padding; only stored
states are padded, among neighbours in length. No KV cache, and of the LM head two rows at one
position: P(yes) needs no more. The decoder knows nothing of tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kalm_encoder import checkpoint
from kalm_encoder.batching import plan_batches
from kalm_encoder.decoder_forward import last_hidden
from kalm_encoder.errors import InputError, NonFiniteError
from kalm_encoder.prompts import DEFAULT_INSTRUCTION, render_query

if TYPE_CHECKING:
    from numpy.typing import NDArray

CPU_TOKEN_BUDGET = 4096
GPU_TOKEN_BUDGET = 131072


class QueryDecoder:
    """The decoder of one checkpoint on one device.

    Attributes:
        model: the decoder, in eval mode; its embedding is the LM head too.
        query_max_length: tokens the raw query is cut to before it goes into the prompt.
        token_budget: prompt tokens plus states, padding included, of one forward.
        fingerprint: of the checkpoint the weights come from; a table must record the same.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        fingerprint: str,
        query_max_length: int = 512,
        token_budget: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.query_max_length = query_max_length
        default = CPU_TOKEN_BUDGET if self.device.type == "cpu" else GPU_TOKEN_BUDGET
        self.token_budget = default if token_budget is None else token_budget
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
    ) -> QueryDecoder:
        """Load the decoder of a hub id or a local directory, and nothing else of it.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, damaged or no KaLM reranker, or
                its tokenizer splits `yes` or `no`.
            InputError: an impossible device or dtype.
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

    def prompt_ids(self, query: str, instruction: str | None = None) -> list[int]:
        """Return the decoder prompt of a query as token ids.

        As in the reference, the raw query is tokenised, cut, decoded and only then inserted.
        """
        ids = self.tokenizer(query, add_special_tokens=False, verbose=False)["input_ids"]
        cut = self.tokenizer.decode(
            ids[: self.query_max_length],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        prompt = render_query(cut, DEFAULT_INSTRUCTION if instruction is None else instruction)
        tokens: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return tokens

    @torch.inference_mode()
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
        for i, array in enumerate(states):
            if array.ndim != 2 or not len(array) or array.shape[1] != self.dim:
                raise InputError(
                    f"states[{i}] has shape {array.shape}; this decoder takes (m, {self.dim})"
                )
        prompt = torch.tensor([self.prompt_ids(query, instruction)], device=self.device)
        scores: list[tuple[float, float]] = [(0.0, 0.0)] * len(states)
        sizes = [len(array) for array in states]
        for batch in plan_batches(sizes, self.token_budget, overhead=prompt.shape[1]):
            logits = self.forward(prompt, [states[i] for i in batch])
            if not torch.isfinite(logits).all():
                raise NonFiniteError(
                    f"the decoder made non-finite logits in {self.model.dtype}; load it in "
                    "bfloat16 or float32"
                )
            margins = logits[:, 0] - logits[:, 1]
            for i, p, margin in zip(
                batch, margins.sigmoid().tolist(), margins.tolist(), strict=True
            ):
                scores[i] = (p, margin)
        return scores

    def forward(self, prompt: torch.Tensor, states: list[NDArray[np.floating]]) -> torch.Tensor:
        """Run the decoder on one prompt and b passages.

        Args:
            prompt: (1, p) token ids.
            states: b arrays (m_i, d).

        Returns:
            (b, 2) float32 logits of `yes` and `no` at the last prompt position.
        """
        passages, real = self._pad(states)
        hidden = last_hidden(self.model, prompt, passages, real)
        logits: torch.Tensor = hidden.float() @ self._answers.T
        cap = self.model.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _pad(self, states: list[NDArray[np.floating]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (b, m, d) states in the compute dtype and their (b, m) bool mask."""
        longest = max(len(array) for array in states)
        padded = np.zeros((len(states), longest, self.dim), dtype=states[0].dtype)
        for row, array in zip(padded, states, strict=True):
            row[: len(array)] = array
        lengths = torch.tensor([len(array) for array in states], device=self.device)
        real = torch.arange(longest, device=self.device) < lengths.unsqueeze(1)
        return torch.from_numpy(padded).to(self.device, self.model.dtype), real
