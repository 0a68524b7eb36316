"""The decoder's forward through torch.compile, for batches whose shapes are rounded up.

One graph is compiled for all shapes. A GPU records each shape once more as a CUDA graph, so there
must be few shapes, and the first request should meet none that is new: rows and states are rounded
up to powers of two, prompts to multiples of 32. What is added is never attended to: rows are
dropped, states are masked, and prompts are padded on the left, so that the last position stays the
last.

This is tested on a CPU with inductor, where it gains nothing. It is meant for a GPU, where it was
not tried.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from kalm_encoder.errors import InputError
from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden

logger = logging.getLogger(__name__)
NUM_ROWS = (2, 4, 8, 16, 32, 64, 128)
"""Rows that a batch may have. torch would compile a separate graph for a batch of one."""
NUM_STATES = (8, 16, 32, 64, 128, 256)
"""States per passage for which `warm_up` prepares shapes."""
PROMPT_STEP_TOKENS = 32
"""Prompts are padded to a multiple of this many tokens."""


class CompiledForward:
    """`last_hidden` of one decoder; the first call compiles it.

    Args:
        model: A T5Gemma2Decoder in eval mode.
        token_budget: Most prompt tokens plus states of one forward, with padding.
    """

    def __init__(self, model: Any, token_budget: int) -> None:
        self.model = model
        self.token_budget = token_budget
        self.on_gpu = model.device.type == "cuda"
        mode = "reduce-overhead" if self.on_gpu else None  # CUDA graphs
        self._run = torch.compile(_last_hidden, dynamic=True, mode=mode)

    def make_batches(self, sizes: Sequence[int], length: int) -> list[list[int]]:
        """Group passages for prompts of one length so that a rounded batch fits the budget.

        Args:
            sizes: Number of states of each passage.
            length: Number of tokens of the prompt.

        Returns:
            Batches of indices into `sizes`, each index once, longest passages first.

        Example: Sizes 3, 9, 8 are rounded to 8, 16, 8 states and give [[1], [0, 2]].
        """
        alike = defaultdict(list)
        for i, size in enumerate(sizes):
            alike[_power(size, NUM_STATES[0])].append(i)
        batches = []
        for states, members in sorted(alike.items(), reverse=True):
            rows = self._rows(_prompt(length), states)[-1]
            batches += [members[at : at + rows] for at in range(0, len(members), rows)]
        return batches

    def shapes(self, length: int) -> list[tuple[int, int, int]]:
        """Return the (rows, prompt, states) that prompts of a length can meet, smallest first.

        Passages with more states than NUM_STATES have larger shapes, which are not prepared.
        """
        prompt = _prompt(length)
        return [(rows, prompt, m) for m in NUM_STATES for rows in self._rows(prompt, m)]

    def warm_up(self, shortest: int) -> None:
        """Compile, and on a GPU run every shape that queries of up to 64 tokens can meet.

        It must run in the thread that will score, because CUDA graphs belong to a thread. On a CPU
        one shape is enough for all.

        Args:
            shortest: Number of tokens of the prompt of an empty query.

        Raises:
            InputError: If torch cannot compile on this machine.
        """
        began, weight = time.monotonic(), self.model.embed_tokens.weight
        lengths = (shortest, shortest + PROMPT_STEP_TOKENS, shortest + 64)
        shapes = sorted({shape for length in lengths for shape in self.shapes(length)})
        chosen = shapes if self.on_gpu else shapes[:1]
        for rows, prompt, states in chosen:
            tokens = weight.new_zeros((1, prompt), dtype=torch.long)
            passages = weight.new_zeros((rows, states, weight.shape[1]))
            memory = PassageMemory(passages, weight.new_ones((1, states), dtype=torch.bool))
            try:
                self(tokens, memory)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise InputError(
                    f"torch cannot compile on this machine, leave compile out: {error}"
                ) from error
        logger.info(
            "compiled in %.1f s, %d shapes are ready", time.monotonic() - began, len(chosen)
        )

    @torch.inference_mode()
    def __call__(self, prompts: torch.Tensor, memory: PassageMemory) -> torch.Tensor:
        """Return (b, d) as `last_hidden` does.

        Args:
            prompts: Token ids of prompts of one length, (1 or b, p).
            memory: Memory of the b passages.
        """
        (b, m), p = memory.states.shape[:2], prompts.shape[1]
        rows, length, states = _power(b, NUM_ROWS[0]), _prompt(p), _power(m, NUM_STATES[0])
        more = (length - p, 0, 0, rows - b)
        real = pad(memory.real.expand(b, -1), (0, states - m, 0, rows - b))
        real[b:, 0] = True  # a row that can attend to no state would become NaN
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

    def _rows(self, prompt: int, states: int) -> list[int]:
        """Return those NUM_ROWS that fit the budget, at least the first."""
        most = self.token_budget // (prompt + states)
        return [rows for rows in NUM_ROWS if rows <= max(most, NUM_ROWS[0])]


def _last_hidden(
    model: Any,
    prompts: torch.Tensor,
    positions: torch.Tensor,
    states: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """Call `last_hidden` with tensors alone, which is what torch.compile takes."""
    return last_hidden(model, prompts, PassageMemory(states, real), positions=positions)[0]


def _power(count: int, least: int) -> int:
    """Return the smallest power of two that is neither below `count` nor below `least`."""
    return max(least, 1 << (count - 1).bit_length())


def _prompt(length: int) -> int:
    return -(-length // PROMPT_STEP_TOKENS) * PROMPT_STEP_TOKENS
