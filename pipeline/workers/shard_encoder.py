"""One shard: read, encode, write. Plain Python that knows no Ray and commits nothing."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from kalm_encoder.errors import KalmError, MismatchError, first_line
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.model import checkpoint
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.in_flight import BatchInFlight, PassageTokens
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from pipeline.corpus.passages import Passage, Reject
from pipeline.corpus.shards import Shard, ShardReader
from pipeline.messages import ShardResult, WorkerConfig
from pipeline.table.fragments import open_to_write, write_fragment
from pipeline.workers.device_threads import DeviceThreads

logger = logging.getLogger(__name__)

AHEAD = 2
"""Batches a GPU is given before the first of them must be done: it never waits for the host."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


class ShardEncoder:
    """A loaded encoder and an open table: what a worker process holds.

    `encode` may run in several threads: reading, tokenising and writing overlap. The model is
    loaded and run in lanes of its own.
    """

    def __init__(self, config: WorkerConfig, device: str | None = None) -> None:
        spec = config.spec
        files = checkpoint.resolve(spec.model, spec.revision)
        if files.fingerprint != spec.fingerprint:
            raise MismatchError(
                "fingerprint",
                f"the model {spec.model} on this worker has fingerprint {files.fingerprint}, the "
                f"table {spec.fingerprint}: put the same files on every node",
            )
        place = checkpoint.choose_device(device)
        if place.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(config.gpu_share)
        if place.type == "cpu":
            keep_freed_memory()
        self._lanes = DeviceThreads(place, config.threads)
        self._ahead: deque[BatchInFlight] = deque()
        self.encoder = self._lanes.submit(
            lambda: PassageEncoder(
                files.load_text_encoder(place, checkpoint.choose_dtype(None, place)),
                files.tokenizer(),
                max_length=spec.max_length,
                token_budget=config.token_budget,
                compile=config.compile,
            )
        ).result()
        self.spec = spec
        self._dataset = open_to_write(Location(config.uri, config.storage_options))
        self._storage_options = config.storage_options
        self._readers = threading.local()
        logger.info(
            "loaded %s on %s, %d tokens a forward", spec.model, place, self.encoder.token_budget
        )
        self._stopped = threading.Event()

    def encode(self, shard: Shard) -> ShardResult:
        """Encode one shard into one uncommitted fragment.

        Up to IN_FLIGHT threads may call it: while one shard is on the device the next is read and
        tokenised and the one before is written.

        Raises:
            InputError: its input changed since it was planned.
            OSError: the store refused the write.
        """
        clock = _Clock()
        passages, rejects = self._reader().read(shard)
        clock.lap("read")
        tokens = self.encoder.tokenise([p.text for p in passages])
        clock.lap("tokenise")
        started = self._start(tokens)
        states = _collect(started)
        clock.lap("device")
        kept, failed = self._split_storable(shard, passages, states)
        fragment = None
        if kept:
            rows = build_rows(
                self.spec,
                [p.id for p, _ in kept],
                [p.text for p, _ in kept],
                [s for _, s in kept],
                shard.id,
            )
            fragment = write_fragment(rows, self._dataset)
        clock.lap("write")
        num_tokens = sum(len(t.ids) for t in tokens)
        spent = sum(clock.seconds.values())
        logger.debug("%d rows, %d tokens in %.2f s", len(kept), num_tokens, spent)
        return ShardResult(
            shard,
            fragment,
            num_rows=len(kept),
            rejects=(*rejects, *failed),
            num_tokens=num_tokens,
            padded_tokens=sum(s.computed for s in started if isinstance(s, BatchInFlight)),
            num_truncated=sum(t.truncated for t in tokens),
            seconds=_stages(clock.seconds, started, self._lanes.count),
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )

    def stop(self) -> None:
        """Let the shards under way fail at their next batch; no more can be encoded."""
        self._stopped.set()
        self._lanes.stop()

    def device_is_lost(self) -> bool:
        """Whether a GPU fails whatever it is given, as after an error that spoiled its context."""
        if self.encoder.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.encoder.device)
            except RuntimeError:
                return True
        return False

    def _start(self, tokens: Sequence[PassageTokens]) -> list[BatchInFlight | str]:
        """Send a shard to the device; a passage that fails is its reason.

        Raises:
            KalmError: `stop` was called.
            RuntimeError: whatever the encoder raised, where it fails for every passage: then the
                device is at fault, not the passages.
        """
        batches = self.encoder.batches([len(t.ids) for t in tokens])
        parts = self._lanes.map(self._run, ([tokens[i] for i in batch] for batch in batches))
        started = [one for part in parts for one in part]
        if any(isinstance(s, str) for s in started) and len(tokens) > 1:
            good = next((s.tokens[0] for s in started if isinstance(s, BatchInFlight)), tokens[0])
            # Raises again where the device itself is broken, by now or from the start.
            again = self._lanes.submit(self.encoder.encode_batch, [good], ratio=self.spec.ratios[0])
            again.result()
        return started

    def _run(self, batch: Sequence[PassageTokens]) -> list[BatchInFlight | str]:
        """Start a batch, in a lane; a GPU must be done with the one AHEAD of it."""
        if self._stopped.is_set():
            raise KalmError("the encoder was stopped")
        started = self._isolate(batch)
        if self.encoder.device.type == "cuda":
            self._ahead.extend(s for s in started if isinstance(s, BatchInFlight))
            while len(self._ahead) > AHEAD:
                self._ahead.popleft().result()
        return started

    def _isolate(self, batch: Sequence[PassageTokens]) -> list[BatchInFlight | str]:
        """Start a batch; where that fails its halves, down to the passages that are at fault."""
        try:
            return list(self.encoder.start(batch, ratio=self.spec.ratios[0]))
        except (RuntimeError, MemoryError, ValueError, IndexError) as error:
            if len(batch) == 1:
                return [f"the encoder failed: {type(error).__name__}: {first_line(error)}"]
            logger.warning("%d passages failed, trying halves: %s", len(batch), first_line(error))
            half = len(batch) // 2
            return self._isolate(batch[:half]) + self._isolate(batch[half:])

    def _reader(self) -> ShardReader:
        """Return this thread's reader: file positions are not shared."""
        if not hasattr(self._readers, "reader"):
            self._readers.reader = ShardReader(self._storage_options)
        reader: ShardReader = self._readers.reader
        return reader

    def _split_storable(
        self, shard: Shard, passages: Sequence[Passage], states: Sequence[PassageStates | str]
    ) -> tuple[list[tuple[Passage, PassageStates]], list[Reject]]:
        """Separate passages that the encoder or the store's dtype cannot take."""
        top = self.spec.codec.limit
        kept, rejects = [], []
        for passage, encoded in zip(passages, states, strict=True):
            if isinstance(encoded, str):
                reason = encoded
            elif np.abs(encoded.states).max() <= top:  # False for NaN as well
                kept.append((passage, encoded))
                continue
            else:
                reason = f"states are not finite in {self.spec.store_dtype}; try float32"
            rejects.append(Reject(shard.path, passage.line, reason, passage.id))
        return kept, rejects


def keep_freed_memory() -> None:
    """Let malloc keep what a forward frees, for the next one.

    By default glibc gives large blocks back to the system at once, and each activation of each
    layer is paged in and zeroed anew: up to a fifth of a CPU worker's time. See mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt and not (mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 1 << 30)):
        logger.warning("malloc keeps its defaults: encoding on this CPU will be slower")


def _collect(started: Sequence[BatchInFlight | str]) -> list[PassageStates | str]:
    """Wait for the device; return the states of every passage, or the reason it has none."""
    return [
        outcome
        for batch in started
        for outcome in ([batch] if isinstance(batch, str) else batch.result())
    ]


def _stages(
    host: dict[str, float], started: Sequence[BatchInFlight | str], lanes: int
) -> dict[str, float]:
    """Return the seconds of a shard by stage, from the host's laps and the device's clock.

    DeviceThreads work side by side: a second of one of n is the nth part of one of the device.
    """
    seconds = {"read": host["read"], "tokenise": host["tokenise"]}
    device = dict.fromkeys(("idle", "forward", "pool"), 0.0)
    for batch in started:
        if isinstance(batch, BatchInFlight):
            for stage, spent in batch.seconds.items():
                device[stage] += spent / lanes
    busy = device["forward"] + device["pool"]
    seconds["queued"] = max(0.0, host["device"] - busy)
    return {**seconds, **device, "write": host["write"]}


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self._last
        self._last = now
