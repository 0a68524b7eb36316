"""The decoder's forward as CUDA graphs: a request of few candidates costs no launches.

Launching the kernels of one forward takes a host longer than a GPU takes to run them for a hundred
candidates. A CUDA graph is launched at once, but only for the shape that it was recorded with, so
shapes are rounded up to a few: rows, states and prompts. What is added is never attended to: rows
are dropped, states are masked, and prompts are padded on the left, so that the last position stays
the last. Larger forwards, in which launches do not matter, run as they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden

logger = logging.getLogger(__name__)

NUM_ROWS = (8, 16, 32, 64, 128)
"""Rows that a graph may have."""
NUM_STATES = (16, 64, 256)
"""States per passage that a graph may have; padded ones cost only their keys and values."""
PROMPT_STEP_TOKENS = 32
"""Prompts are padded to a multiple of this many tokens."""
LONGEST_PROMPT_TOKENS = 256
"""Longest prompt of a graph."""
USUAL_QUERY_TOKENS = 64
"""Queries of up to this many tokens meet only graphs that `record_usual` has recorded."""


class Shape(NamedTuple):
    """A shape that a graph is recorded for."""

    rows: int
    prompt: int
    states: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    prompt: torch.Tensor
    positions: torch.Tensor
    memory: PassageMemory
    hidden: torch.Tensor

    def fill(self, prompt: torch.Tensor, memory: PassageMemory) -> None:
        """Write a batch of at most this shape into the tensors that the graph reads."""
        missing = len(self.prompt) - len(prompt)
        self.prompt[:missing] = 0
        self.prompt[missing:] = prompt
        torch.arange(-missing, len(prompt), out=self.positions)
        states, real = self.memory.states, self.memory.real
        b, m = memory.states.shape[:2]
        states.zero_()  # what an earlier batch left would be masked, but 0 x NaN is NaN
        states[:b, :m] = memory.states
        real.zero_()
        real[:b, :m] = memory.real
        real[b:, 0] = True  # a row that can attend to no state would become NaN


class DecoderGraphs:
    """The graphs of one decoder. A shape that is new is recorded when it is first met.

    Args:
        model: A T5Gemma2Decoder in eval mode on a CUDA device.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        weight, width = model.embed_tokens.weight, int(model.config.hidden_size)
        self._recorded: dict[Shape, Recorded] = {}
        self._lock = threading.Lock()
        self._usable = True
        # One graph runs at a time, so that all of them can use the same memory.
        self._pool = torch.cuda.graph_pool_handle()
        largest = Shape(NUM_ROWS[-1], LONGEST_PROMPT_TOKENS, NUM_STATES[-1])
        self._prompt = weight.new_zeros(largest.prompt, dtype=torch.long)
        self._positions = torch.zeros_like(self._prompt)
        self._real = weight.new_zeros(largest.rows * largest.states, dtype=torch.bool)
        self._states = weight.new_zeros(largest.rows * largest.states * width)

    def __reduce__(self) -> tuple[type[DecoderGraphs], tuple[Any]]:
        """Pickle the model alone: a graph belongs to its process, and the copy records anew."""
        return DecoderGraphs, (self.model,)

    def __call__(self, prompt: torch.Tensor, memory: PassageMemory) -> torch.Tensor | None:
        """Return (b, d) as `last_hidden` does, or None if no graph is meant for this shape.

        Args:
            prompt: Token ids of the prompt that all passages share, (p,).
            memory: Memory of the b passages.
        """
        shape = round_up(memory.rows, len(prompt), memory.states.shape[1])
        if shape is None or not self._usable:
            return None
        with self._lock:
            recorded = self._recorded.get(shape) or self._record(shape)
            if recorded is None:
                return None
            recorded.fill(prompt, memory)
            recorded.graph.replay()
            return recorded.hidden[: memory.rows].clone()

    @torch.inference_mode()
    def record_usual(self, shortest: int) -> None:
        """Record every shape that queries of up to USUAL_QUERY_TOKENS can meet, and replay each.

        Args:
            shortest: Number of tokens of the prompt of an empty query.
        """
        began = time.monotonic()
        for rows, length, num_states in usual_shapes(shortest):
            states = self._states.new_zeros((rows, num_states, self.model.config.hidden_size))
            real = self._real.new_ones((1, num_states))
            self(self._prompt.new_zeros(length), PassageMemory(states, real))
        logger.info(
            "recorded %d CUDA graphs in %.1f s", len(self._recorded), time.monotonic() - began
        )

    @torch.inference_mode()
    def _record(self, shape: Shape) -> Recorded | None:
        rows, length, num_states = shape
        cells = rows * num_states
        prompt, positions = self._prompt[:length], self._positions[:length]
        states = self._states[: cells * self.model.config.hidden_size]
        real = self._real[:cells].view(rows, num_states)
        memory = PassageMemory(states.view(rows, num_states, -1), real)
        graph = torch.cuda.CUDAGraph()
        device = self._states.device

        def run() -> torch.Tensor:
            return last_hidden(self.model, prompt[None], memory, positions=positions, fuse=True)[0]

        try:
            with torch.cuda.device(device):
                side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    run()  # what is compiled or allocated once must not be recorded
                torch.cuda.current_stream(device).wait_stream(side)
                # Other threads may go on using the device.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    hidden = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._usable = False
            logger.warning("no CUDA graph can be recorded, so requests launch kernels: %s", error)
            return None
        recorded = Recorded(graph, prompt, positions, memory, hidden)
        self._recorded[shape] = recorded
        return recorded


def round_up(rows: int, prompt: int, states: int) -> Shape | None:
    """Return the smallest shape of a graph that holds a batch, or None if none does.

    Example: 10 rows, a prompt of 70 tokens and 20 states per passage give Shape(16, 96, 64).
    """
    fitting_rows = next((n for n in NUM_ROWS if n >= rows), None)
    fitting_states = next((n for n in NUM_STATES if n >= states), None)
    if not fitting_rows or not fitting_states or prompt > LONGEST_PROMPT_TOKENS:
        return None
    return Shape(fitting_rows, _round_prompt(prompt), fitting_states)


def usual_shapes(shortest: int) -> Sequence[Shape]:
    """Return the shapes of prompts of `shortest` to `shortest` + USUAL_QUERY_TOKENS tokens."""
    longest = min(shortest + USUAL_QUERY_TOKENS, LONGEST_PROMPT_TOKENS)
    first, last = _round_prompt(shortest), _round_prompt(longest)
    prompts = range(first, last + 1, PROMPT_STEP_TOKENS)
    return [Shape(rows, p, m) for p in prompts for rows in NUM_ROWS for m in NUM_STATES]


def _round_prompt(length: int) -> int:
    return -(-length // PROMPT_STEP_TOKENS) * PROMPT_STEP_TOKENS
