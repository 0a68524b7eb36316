"""One device thread that works for many callers in common batches, and for nobody who has left."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.in_flight import PassageTokens
from kalm_encoder.model.pairs import Pair
from kalm_encoder.service import traces

T = TypeVar("T")
R = TypeVar("R")
Score = tuple[float, float]

CPU_BATCH_TOKENS = 1024
"""Most prompt tokens plus states of a batch of pairs on a CPU. Larger ones were measured to be no
faster per pair, and the next caller waits for the batch that is being computed."""
TOKENISED_TEXTS = 64
"""Number of texts that a caller tokenises and queues at a time; it can leave between two times."""


class Caller:
    """Somebody who waits for an answer. Once it has left, nothing more is begun for it."""

    def __init__(self) -> None:
        self._left = False
        self._waits_for: Future[Any] | None = None

    def run(self, function: Callable[[], R]) -> R:
        """Call a function in this thread; what it queues meanwhile is queued for this caller."""
        token = CALLER.set(self)
        try:
            return function()
        finally:
            CALLER.reset(token)

    def leave(self) -> None:
        """Cancel what this caller waits for now, and refuse what it will wait for."""
        self._left = True
        if self._waits_for is not None:
            self._waits_for.cancel()

    def wait_for(self, future: Future[Any]) -> None:
        """Have the future cancelled when this caller leaves, or at once if it has left."""
        self._waits_for = future  # before the look at _left: `leave` sees one or the other
        if self._left:
            future.cancel()


CALLER: ContextVar[Caller] = ContextVar("caller")
"""The caller that the current thread works for; unset for the service's own work."""


@dataclass(eq=False)
class _Call(Generic[T, R]):
    """The items of one call, those already taken into a batch, and the results so far."""

    items: Sequence[T]
    taken: int = 0
    results: dict[int, R] = field(default_factory=dict)
    done: Future[list[R]] = field(default_factory=Future)
    waiting: traces.Waiting | None = field(default_factory=traces.waiting)

    def put(self, place: int, result: R) -> None:
        self.results[place] = result
        if len(self.results) == len(self.items):
            with suppress(InvalidStateError):  # the caller left in this moment
                self.done.set_result([self.results[i] for i in range(len(self.items))])

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # the caller left, or another item has failed
            self.done.set_exception(error)


class BatchQueue(Generic[T, R]):
    """A queue of items of one kind: first come, first served, in batches across callers.

    Args:
        name: Name of what is done, for the spans of its batches.
        run: Function that works on one batch, in the device thread.
        size: Function that returns the number of tokens of an item.
        budget: Function that returns the most tokens of a batch; a larger item goes alone.
        observe: Function that is told the number of items of every batch.
        computed: Function that returns the number of tokens computed so far, with padding.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[T]], Sequence[R]],
        size: Callable[[T], int],
        budget: Callable[[], int],
        observe: Callable[[int], None],
        computed: Callable[[], int],
    ) -> None:
        self._run, self._size, self._budget, self._observe = run, size, budget, observe
        self._name, self._computed = name, computed
        self._calls: deque[_Call[T, R]] = deque()

    def __len__(self) -> int:
        """Return how many items wait, without those of callers who have left."""
        calls = tuple(self._calls)  # a copy: other threads add to the queue
        return sum(len(call.items) - call.taken for call in calls if not call.done.done())

    def put(self, items: Sequence[T]) -> Future[list[R]]:
        """Queue items for the current caller; the future is cancelled when the caller leaves."""
        call: _Call[T, R] = _Call(items)
        if (caller := CALLER.get(None)) is not None:
            caller.wait_for(call.done)
        self._calls.append(call)
        return call.done

    def work(self) -> None:
        """Work on one batch, if anything is queued that somebody waits for."""
        if batch := self._draw():
            self._work_on(batch)

    def _draw(self) -> list[tuple[_Call[T, R], int]]:
        """Take a batch within the token budget, at least one item, from the head of the queue."""
        batch: list[tuple[_Call[T, R], int]] = []
        room = self._budget()
        while self._calls:
            call = self._calls[0]
            if call.taken == len(call.items) or call.done.done():
                self._calls.popleft()
                continue
            room -= self._size(call.items[call.taken])
            if batch and room < 0:
                break
            batch.append((call, call.taken))
            call.taken += 1
        return batch

    def _work_on(self, batch: Sequence[tuple[_Call[T, R], int]]) -> None:
        began, computed = time.time_ns(), self._computed()
        try:
            results = self._run([call.items[place] for call, place in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].fail(error)
            else:  # the fault of one caller must not fail the others
                for call, place in batch:
                    if not call.done.done():
                        self._work_on([(call, place)])
            return
        self._observe(len(results))
        for (call, place), result in zip(batch, results, strict=True):
            call.put(place, result)
        asked = [call.waiting for call, _ in batch]
        if any(asked):
            size = sum(self._size(call.items[place]) for call, place in batch)
            traces.record_batch(self._name, began, asked, size, self._computed() - computed)


class DeviceThread:
    """The one thread that runs the models, because each would start a pool of threads of its own.

    Its queues take turns, batch by batch: nobody waits for more than one batch of another kind.
    The thread ends when nobody holds this object any more.
    """

    def __init__(self) -> None:
        self._queues: list[weakref.ref[BatchQueue[Any, Any]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kalm-device")

    def add(self, queue: BatchQueue[T, R]) -> BatchQueue[T, R]:
        """Let a queue take its turns for as long as somebody holds it."""
        self._queues = [*(one for one in self._queues if one() is not None), weakref.ref(queue)]
        return queue

    def work_through(self, queue: BatchQueue[T, R], items: Sequence[T]) -> list[R]:
        """Queue items and wait for their results.

        Raises:
            concurrent.futures.CancelledError: The caller has left.
        """
        if not items:
            return []
        done = queue.put(items)
        self._thread.submit(self._work_until, done)
        return done.result()

    def call(self, function: Callable[[], T]) -> T:
        """Run another function that needs the device, between two batches."""
        return self._thread.submit(function).result()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._thread.shutdown()

    def _work_until(self, done: Future[Any]) -> None:
        while True:  # at least once, to forget what callers who left had queued
            for one in self._queues:
                if (queue := one()) is not None:
                    queue.work()
            if done.done():
                return


class BatchingDecoder:
    """A `QueryDecoder` for many callers.

    Args:
        decoder: The decoder that scores.
        observe: Function that is told the number of pairs of every batch.
    """

    def __init__(self, decoder: QueryDecoder, observe: Callable[[int], None]) -> None:
        self.decoder = decoder
        self.files, self.prompt = decoder.files, decoder.prompt
        self.device = DeviceThread()
        budget = decoder.token_budget
        if decoder.device.type == "cpu":
            budget = min(budget, CPU_BATCH_TOKENS)
        self.queue: BatchQueue[Pair, Score] = self.device.add(
            BatchQueue(
                "decode",
                decoder.score_pairs,
                lambda pair: pair.size,
                lambda: budget,
                observe,
                lambda: decoder.num_computed,
            )
        )

    def score_pairs(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score pairs in the device thread; see QueryDecoder and DeviceThread.work_through."""
        return self.device.work_through(self.queue, pairs)


class BatchingEncoder:
    """A `PassageEncoder` for many callers, in the device thread of their decoder.

    Args:
        encoder: The encoder.
        ratio: Number of tokens that are averaged into one state.
        device: Device thread, which batches of texts share with those of pairs.
        observe: Function that is told the number of texts of every batch.
    """

    def __init__(
        self,
        encoder: PassageEncoder,
        ratio: int,
        device: DeviceThread,
        observe: Callable[[int], None],
    ) -> None:
        self.encoder, self.ratio, self._device = encoder, ratio, device
        self.queue: BatchQueue[PassageTokens, PassageStates] = device.add(
            BatchQueue(
                "encode",
                lambda batch: encoder.encode_batch(batch, ratio=ratio),
                lambda tokens: len(tokens.ids),
                lambda: encoder.token_budget,
                observe,
                lambda: encoder.num_computed,
            )
        )

    def encode(self, texts: Sequence[str]) -> list[PassageStates]:
        """Encode texts in the device thread; see DeviceThread.work_through."""
        states: list[PassageStates] = []
        for start in range(0, len(texts), TOKENISED_TEXTS):
            tokens = self.encoder.tokenise(texts[start : start + TOKENISED_TEXTS])
            states += self._device.work_through(self.queue, tokens)
        return states
