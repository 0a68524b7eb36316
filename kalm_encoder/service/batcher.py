"""One device thread that scores the pairs of many callers in common batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from kalm_encoder.model.decoder import Pair, Prompt, QueryDecoder

Scores = list[tuple[float, float]]


class _Work:
    """Pairs of one caller, some of them scored."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.scores: Scores = []
        self.future: Future[Scores] = Future()

    def draw(self, budget: int) -> Sequence[Pair]:
        """Return the next pairs within a token budget, at least one."""
        start = len(self.scores)
        end, cost = start, 0
        for pair in self.pairs[start:]:
            cost += pair.size
            if end > start and cost > budget:
                break
            end += 1
        return self.pairs[start:end]


class BatchingDecoder:
    """A `QueryDecoder` for many threads: first come, first served, and the rest of a batch shared.

    The model runs in one thread: on a CPU each thread that runs it would bring a pool of its own.

    Args:
        decoder: what scores.
        observe: told the pairs of every batch.

    Attributes:
        users: requests that hold it; its owner counts them.
    """

    def __init__(self, decoder: QueryDecoder, observe: Callable[[int], None]) -> None:
        self.decoder = decoder
        self.users = 0
        self._observe = observe
        self._queue: deque[_Work | tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kalm-device", daemon=True)
        self._thread.start()

    @property
    def dim(self) -> int:
        """Width of the states."""
        return self.decoder.dim

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint."""
        return self.decoder.fingerprint

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """See QueryDecoder."""
        return self.decoder.prompt(query, instruction)

    def recall(self, prompt: Prompt, key: Hashable) -> torch.Tensor | None:
        """See QueryDecoder."""
        return self.decoder.recall(prompt, key)

    def score_pairs(self, pairs: Sequence[Pair]) -> Scores:
        """Score pairs; waits for the device thread. See QueryDecoder."""
        if not pairs:
            return []
        work = _Work(pairs)
        self._add(work)
        return work.future.result()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run something else that needs the device, between two batches."""
        future: Future[Any] = Future()
        self._add((function, future))
        return future.result()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _add(self, item: _Work | tuple[Callable[[], Any], Future[Any]]) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("this decoder is closed")
            self._queue.append(item)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                batch: list[tuple[_Work, Sequence[Pair]]] = []
                if isinstance(self._queue[0], tuple):
                    function, future = self._queue.popleft()  # type: ignore[misc]
                else:
                    batch = self._draw()
            if batch:
                self._score(batch)
            else:
                _settle(future, function)

    def _draw(self) -> list[tuple[_Work, Sequence[Pair]]]:
        """Fill one batch from the queue's head; what is drawn to its end leaves the queue."""
        batch: list[tuple[_Work, Sequence[Pair]]] = []
        budget = self.decoder.token_budget
        while self._queue and budget > 0 and isinstance(work := self._queue[0], _Work):
            pairs = work.draw(budget)
            batch.append((work, pairs))
            budget -= sum(pair.size for pair in pairs)
            if len(work.scores) + len(pairs) < len(work.pairs):
                break  # the budget is used up
            self._queue.popleft()
        return batch

    def _score(self, batch: list[tuple[_Work, Sequence[Pair]]]) -> None:
        try:
            scores = self.decoder.score_pairs([pair for _, pairs in batch for pair in pairs])
        except Exception as error:
            if len(batch) > 1:  # one caller's fault must not fail another's request
                for part in batch:
                    self._score([part])
                return
            work = batch[0][0]
            with self._changed:
                if self._queue and self._queue[0] is work:
                    self._queue.popleft()
            work.future.set_exception(error)
            return
        self._observe(len(scores))
        done = iter(scores)
        for work, pairs in batch:
            work.scores += [next(done) for _ in pairs]
            if len(work.scores) == len(work.pairs):
                work.future.set_result(work.scores)


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
