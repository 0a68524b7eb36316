"""One device thread that scores the pairs of many callers in common batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import TypeVar

from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.pairs import Pair

Scores = list[tuple[float, float]]
T = TypeVar("T")


class _Scoring:
    """The pairs of one caller, how many of them were drawn, and the scores they have so far."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.num_drawn = 0
        self.scores: Scores = []
        self.future: Future[Scores] = Future()


class BatchingDecoder:
    """A `QueryDecoder` for many threads: first come, first served, and batches are shared.

    The model runs in one thread, because on a CPU each thread that runs it would start a pool of
    threads of its own. That thread ends when nobody holds this object any more.

    Args:
        decoder: The decoder that scores.
        observe: Function that is told the number of pairs of every batch.
    """

    def __init__(self, decoder: QueryDecoder, observe: Callable[[int], None]) -> None:
        self.decoder = decoder
        self.dim, self.fingerprint = decoder.dim, decoder.fingerprint
        self.prompt, self.recall = decoder.prompt, decoder.recall
        self._observe = observe
        self._queue: deque[_Scoring] = deque()
        self._lock = threading.Lock()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="kalm-device")

    def score_pairs(self, pairs: Sequence[Pair]) -> Scores:
        """Score pairs; waits for the device thread. See QueryDecoder."""
        if not pairs:
            return []
        scoring = _Scoring(pairs)
        with self._lock:  # the device thread must not look before the pairs are queued
            self._device.submit(self._score_until_done, scoring)
            self._queue.append(scoring)
        return scoring.future.result()

    def call(self, function: Callable[[], T]) -> T:
        """Run another function that needs the device, between two batches."""
        return self._device.submit(function).result()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._device.shutdown()

    def _score_until_done(self, scoring: _Scoring) -> None:
        """Score batches from the head of the queue until one has finished `scoring`."""
        while not scoring.future.done():
            self._score(self._draw())

    def _draw(self) -> list[tuple[_Scoring, Pair]]:
        """Draw a batch within the token budget, at least one pair, from the head of the queue."""
        batch: list[tuple[_Scoring, Pair]] = []
        with self._lock:
            room = self.decoder.token_budget
            while self._queue:
                scoring = self._queue[0]
                pair = scoring.pairs[scoring.num_drawn]
                room -= pair.size
                if batch and room < 0:
                    break
                batch.append((scoring, pair))
                scoring.num_drawn += 1
                if scoring.num_drawn == len(scoring.pairs):
                    self._queue.popleft()
        return batch

    def _score(self, batch: list[tuple[_Scoring, Pair]]) -> None:
        try:
            scores = self.decoder.score_pairs([pair for _, pair in batch])
        except Exception as error:
            self._score_apart(batch, error)
            return
        self._observe(len(scores))
        for (scoring, _), score in zip(batch, scores, strict=True):
            scoring.scores.append(score)
            if len(scoring.scores) == len(scoring.pairs):
                scoring.future.set_result(scoring.scores)

    def _score_apart(self, batch: list[tuple[_Scoring, Pair]], error: Exception) -> None:
        """Score a failed batch caller by caller: the fault of one must not fail the others."""
        parts = [list(part) for _, part in groupby(batch, key=lambda drawn: drawn[0])]
        if len(parts) > 1:
            for part in parts:
                self._score(part)
            return
        scoring = batch[0][0]
        with self._lock:
            if scoring in self._queue:
                self._queue.remove(scoring)
        scoring.future.set_exception(error)
