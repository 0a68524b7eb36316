"""One device thread that scores the pairs of many callers in common batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.pairs import Pair

T = TypeVar("T")
Score = tuple[float, float]
Queued = tuple[Pair, Future[Score]]
"""A pair, and the promise of its score and margin to the caller that waits for it."""


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
        self.fingerprint, self.prompt = decoder.fingerprint, decoder.prompt
        self._observe = observe
        self._queue: deque[Queued] = deque()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="kalm-device")

    def score_pairs(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score pairs; waits for the device thread. See QueryDecoder."""
        queued = [(pair, Future[Score]()) for pair in pairs]
        self._queue.extend(queued)
        if queued:
            self._device.submit(self._score_until_done, queued[-1][1])
        return [future.result() for _, future in queued]

    def call(self, function: Callable[[], T]) -> T:
        """Run another function that needs the device, between two batches."""
        return self._device.submit(function).result()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._device.shutdown()

    def _score_until_done(self, last: Future[Score]) -> None:
        """Score batches from the head of the queue until the last pair of a caller is done."""
        while not last.done():
            self._score(self._draw())

    def _draw(self) -> list[Queued]:
        """Take a batch within the token budget, at least one pair, from the head of the queue."""
        batch: list[Queued] = []
        room = self.decoder.token_budget
        while self._queue:
            room -= self._queue[0][0].size
            if batch and room < 0:
                break
            batch.append(self._queue.popleft())
        return batch

    def _score(self, batch: Sequence[Queued]) -> None:
        try:
            scores = self.decoder.score_pairs([pair for pair, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:  # the fault of one caller must not fail the others
                for one in batch:
                    self._score([one])
            return
        self._observe(len(scores))
        for (_, future), score in zip(batch, scores, strict=True):
            future.set_result(score)
