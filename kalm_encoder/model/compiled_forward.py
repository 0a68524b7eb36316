"""The decoder's forward through torch.compile, for batches whose shapes are rounded up to a few.

One graph is compiled for all shapes. A GPU records each shape once more, as a CUDA graph, so there
must be few and they should be met before the first request: rows and states are rounded up to
powers of two, prompts to multiples of 32. What is added is never attended to: rows are dropped,
states masked, and prompts padded on the left, so that their last position stays the last.

Tested on a CPU with inductor, where it gains nothing; untried on a GPU, which it is for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from kalm_encoder.errors import InputError
from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden

LEAST_ROWS, MOST_ROWS = 2, 128  # torch would compile a batch of one apart
LEAST_STATES, MOST_STATES = 8, 256
PROMPT_STEP = 32


class CompiledForward:
    """`last_hidden` of one decoder, compiled when it is first called.

    Args:
        model: a T5Gemma2Decoder in eval mode.
        token_budget: prompt tokens plus states, padding included, of one forward.
    """

    def __init__(self, model: Any, token_budget: int) -> None:
        self.model = model
        self.token_budget = token_budget
        self.on_gpu = model.device.type == "cuda"
        mode = "reduce-overhead" if self.on_gpu else None  # CUDA graphs
        self._run = torch.compile(_last_hidden, dynamic=True, mode=mode)

    def plan(self, sizes: Sequence[int], length: int) -> list[list[int]]:
        """Group passages for prompts of one length so that a rounded batch fits the budget.

        Args:
            sizes: states of each passage.
            length: tokens of the prompt.

        Returns:
            Batches of indices into `sizes`, each index once; longest passages first.

        Example: sizes 3, 9, 8 are rounded to 8, 16, 8 states and give [[1], [0, 2]].
        """
        alike = defaultdict(list)
        for i, size in enumerate(sizes):
            alike[_power(size, LEAST_STATES)].append(i)
        batches = []
        for states, members in sorted(alike.items(), reverse=True):
            rows = self._most_rows(_prompt(length), states)
            batches += [members[at : at + rows] for at in range(0, len(members), rows)]
        return batches

    def shapes(self, length: int) -> list[tuple[int, int, int]]:
        """Return the (rows, prompt, states) that prompts of a length can meet, smallest first.

        Passages of more than MOST_STATES states have shapes beyond these, met when they come.
        """
        prompt, states, found = _prompt(length), LEAST_STATES, []
        while states <= MOST_STATES:
            rows = LEAST_ROWS
            while rows <= self._most_rows(prompt, states):
                found.append((rows, prompt, states))
                rows *= 2
            states *= 2
        return found

    def warm_up(self, lengths: Sequence[int]) -> int:
        """Compile, and on a GPU run every shape that prompts of these lengths can meet.

        Call it in the thread that will score: CUDA graphs belong to a thread.

        Returns:
            How many shapes were run; on a CPU, one does for all.

        Raises:
            InputError: torch cannot compile here.
        """
        shapes = sorted({shape for length in lengths for shape in self.shapes(length)})
        weight = self.model.embed_tokens.weight
        chosen = shapes if self.on_gpu else shapes[:1]
        for rows, prompt, states in chosen:
            tokens = weight.new_zeros((1, prompt), dtype=torch.long)
            passages = weight.new_zeros((rows, states, weight.shape[1]))
            try:
                self(
                    tokens, PassageMemory(passages, weight.new_ones((1, states), dtype=torch.bool))
                )
            except torch._dynamo.exc.TorchDynamoException as error:
                raise InputError(
                    f"torch cannot compile here, leave compile out: {error}"
                ) from error
        return len(chosen)

    @torch.inference_mode()
    def __call__(self, prompts: torch.Tensor, memory: PassageMemory) -> torch.Tensor:
        """Return (b, d), as `last_hidden` does.

        Args:
            prompts: (1 or b, p) token ids of one length.
            memory: of the b passages.
        """
        (b, m), p = memory.states.shape[:2], prompts.shape[1]
        rows, length, states = _power(b, LEAST_ROWS), _prompt(p), _power(m, LEAST_STATES)
        more = (length - p, 0, 0, rows - b)
        real = pad(memory.real.expand(b, -1), (0, states - m, 0, rows - b))
        real[b:, 0] = True  # a row that may attend to nothing would be NaN
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        hidden: torch.Tensor = self._run(
            self.model,
            pad(prompts.expand(b, -1), more),
            torch.arange(p - length, p, device=prompts.device),
            pad(memory.states, (0, 0, 0, states - m, 0, rows - b)),
            real,
        )
        return hidden[:b]

    def _most_rows(self, prompt: int, states: int) -> int:
        rows = LEAST_ROWS
        while 2 * rows <= MOST_ROWS and 2 * rows * (prompt + states) <= self.token_budget:
            rows *= 2
        return rows


def _last_hidden(
    model: Any,
    prompts: torch.Tensor,
    positions: torch.Tensor,
    states: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """What is compiled: tensors in, a tensor out."""
    return last_hidden(model, prompts, PassageMemory(states, real), positions=positions)[0]


def _power(count: int, least: int) -> int:
    """Return the smallest power of two that is neither below `count` nor below `least`."""
    return max(least, 1 << (count - 1).bit_length())


def _prompt(length: int) -> int:
    return -(-length // PROMPT_STEP) * PROMPT_STEP
