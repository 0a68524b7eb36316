"""One shard: read, encode, write. Plain Python that knows no Ray and commits nothing."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch

from kalm_encoder.errors import MismatchError, first_line
from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.model import checkpoint
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.in_flight import BatchInFlight, PassageTokens
from kalm_encoder.table.codecs import FloatCodec
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.erased import NONE_ERASED, ErasedIds
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import Shard, ShardReader, ShardRows
from pipeline.corpus.splitting import Splitter
from pipeline.messages import ANYWHERE, Place, ShardResult, Task
from pipeline.table.fragments import open_to_write, write_fragment
from pipeline.workers.device_threads import DeviceThreads, keep_freed_memory

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""Batches a GPU has before the first of them must be done. With two it never waits for the host;
more would only hold memory."""


class _PerThread(threading.local):
    """A reader for each thread that uses it: threads cannot share a position in a file."""

    def __init__(
        self, options: dict[str, str] | None, erased: ErasedIds, split: Splitter | None
    ) -> None:
        self.reader = ShardReader(options, erased, split)


class ShardEncoder(Task):
    """A loaded encoder and an open table: what a worker process holds.

    Several threads may call `do`, so that reading, tokenising and writing overlap. The
    model is loaded and run in device threads of its own.

    Args:
        table: Address of the table. Its storage options serve for the inputs too.
        spec: Its spec. The fingerprint must be that of the model that is found here.
        place: CPUs and GPU to use.
        token_budget: Number of tokens per forward pass. None chooses it from the device and its
            free memory.
        erased: Ids that may not come back to the table.

    Raises:
        MismatchError: If the model on this machine is not that of the table.
    """

    def __init__(
        self,
        table: Location,
        spec: TableSpec,
        place: Place = ANYWHERE,
        *,
        token_budget: int | None = None,
        erased: ErasedIds = NONE_ERASED,
    ) -> None:
        self.spec = spec
        files = checkpoint.resolve(spec.model, spec.revision)
        if not files.made(spec.fingerprint, spec.files_hash):
            raise MismatchError(
                "fingerprint",
                f"the model {spec.model} on this worker has fingerprint {files.fingerprint}, the "
                f"table {spec.fingerprint}: put the same files on every node",
            )
        wanted = None if place.gpu is None else "cuda" if place.gpu else "cpu"
        device = checkpoint.choose_device(wanted)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(place.gpu or 1.0)
        keep_freed_memory()
        self._threads = DeviceThreads(device, None if device.type == "cuda" else place.cpus)
        self.encoder = self._threads.submit(
            lambda: PassageEncoder(
                files,
                device=device,
                dtype=spec.compute_dtype,
                max_length=spec.max_length,
                token_budget=token_budget,
            )
        ).result()
        if device.type == "cuda":
            self.encoder.use_fast_tokenizer()
        # Coarser ratios are made from float32, and so are the integers of a codec.
        as_stored = len(spec.ratios) == 1 and isinstance(spec.codec, FloatCodec)
        self._start_batch = partial(
            self.encoder.start,
            ratio=spec.ratios[0],
            dtype=getattr(torch, spec.store_dtype) if as_stored else torch.float32,
            limit=spec.codec.limit,
        )
        self._on_gpu: deque[BatchInFlight] = deque()
        self._dataset = open_to_write(table)
        self._own = _PerThread(table.options, erased, Splitter.of(spec, self.encoder.tokenizer))
        budget = self.encoder.token_budget
        logger.info("loaded %s on %s, %d tokens per forward pass", spec.model, device, budget)

    def do(self, unit: Shard) -> ShardResult:
        """Encode one shard into one uncommitted fragment.

        Raises:
            InputError: If its input changed since it was planned.
            RuntimeError: If the encoder fails on every passage, or after `stop`.
            CancelledError: If `stop` was called while batches waited.
            OSError: If the store refused the write.
        """
        shard, began, times = unit, time.time(), [time.monotonic()]
        rows = self._own.reader.read(shard)
        times.append(time.monotonic())
        tokens = self.encoder.tokenise([p.text for p in rows.passages])
        times.append(time.monotonic())
        started = self._start(tokens)
        kept, states = self._results(shard, rows, started)
        times.append(time.monotonic())
        fragment = self._write(shard, kept, states) if kept.passages else None
        times.append(time.monotonic())
        num_tokens = sum(len(t.ids) for t in tokens)
        num_rows, took = len(kept.passages), times[-1] - times[0]
        logger.debug("%d rows, %d tokens in %.2f s", num_rows, num_tokens, took)
        batches = [s for s in started if isinstance(s, BatchInFlight)]
        return ShardResult(
            shard,
            fragment,
            num_rows=num_rows,
            rejects=tuple(kept.rejects),
            num_tokens=num_tokens,
            padded_tokens=sum(batch.computed for batch in batches),
            num_truncated=sum(t.truncated for t in tokens),
            seconds=_stages(times, batches, self._threads.count),
            worker=f"{socket.gethostname()}:{os.getpid()}",
            compute_dtype=self.encoder.compute_dtype,
            began=began,
        )

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return self.encoder.device.type == "cuda"

    def stop(self) -> None:
        """Let the shards under way fail at their next batch; no more can be encoded."""
        self._threads.stop()

    def device_is_lost(self) -> bool:
        """Return whether a GPU fails whatever it is given, as after an error in its context."""
        if self.encoder.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.encoder.device)
            except RuntimeError:
                return True
        return False

    def _start(self, tokens: Sequence[PassageTokens]) -> list[BatchInFlight | str]:
        """Send a shard to the device; a passage that fails is replaced by the reason.

        Raises:
            RuntimeError: What the encoder raised, if it fails on every passage: then the device is
                at fault, not the passages. Also raised after `stop`.
            CancelledError: If `stop` was called while batches waited.
        """
        parts = self._threads.map(self._run, self.encoder.batches(tokens))
        started = [one for part in parts for one in part]
        if any(isinstance(s, str) for s in started) and len(tokens) > 1:
            good = next((s.tokens[0] for s in started if isinstance(s, BatchInFlight)), tokens[0])
            # This raises again if the device itself is broken, by now or from the start.
            for part in self._threads.map(self._start_batch, [[good]])[0]:
                part.result()
        return started

    def _run(self, batch: Sequence[PassageTokens]) -> list[BatchInFlight | str]:
        """Start a batch, in a device thread; on a GPU leave at most BATCHES_AHEAD unfinished."""
        started = start_isolated(self._start_batch, batch)
        if self.encoder.device.type == "cuda":
            self._on_gpu.extend(s for s in started if isinstance(s, BatchInFlight))
            while len(self._on_gpu) > BATCHES_AHEAD:
                self._on_gpu.popleft().result()
        return started

    def _results(
        self, shard: Shard, rows: ShardRows, started: Sequence[BatchInFlight | str]
    ) -> tuple[ShardRows, list[PackedStates]]:
        """Wait for the device; reject passages that it or the store's dtype cannot take."""
        unstorable = f"states are not finite in {self.spec.store_dtype}; try float32"
        reasons: list[str | None] = []
        states: list[PackedStates] = []
        for part in started:
            if isinstance(part, str):
                reasons.append(part)
                continue
            packed, within = part.result()
            reasons += [None if fits else unstorable for fits in within]
            states.append(packed.select(within, part.ratio))
        judged = zip(rows.passages, reasons, strict=True)
        rejects = [Reject(shard.path, p.line, reason, p.id) for p, reason in judged if reason]
        kept = rows.take([place for place, reason in enumerate(reasons) if reason is None])
        return kept._replace(rejects=rows.rejects + rejects), states

    def _write(self, shard: Shard, kept: ShardRows, states: Sequence[PackedStates]) -> str:
        passages, _, metadata = kept
        ids, texts = [p.id for p in passages], [p.text for p in passages]
        packed = PackedStates.join(states)
        rows = build_rows(self.spec, ids, texts, packed, shard.id, metadata=metadata)
        return write_fragment(rows, self._dataset)


def start_isolated(
    start: Callable[[Sequence[PassageTokens]], list[BatchInFlight]],
    batch: Sequence[PassageTokens],
) -> list[BatchInFlight | str]:
    """Start a batch; if that fails start its halves, down to the passages that are at fault.

    Args:
        start: Sends passages to the device.
        batch: At least one passage.

    Returns:
        What was started, in order; the reason in place of each passage that fails alone.
    """
    try:
        return list(start(batch))
    except (RuntimeError, MemoryError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    # Out of the handler: there the traceback would keep the tensors of the failed forward alive.
    if len(batch) == 1:
        return [f"the encoder failed: {reason}"]
    logger.warning("a batch of %d passages failed, trying its halves: %s", len(batch), reason)
    half = len(batch) // 2
    return start_isolated(start, batch[:half]) + start_isolated(start, batch[half:])


def _stages(
    times: Sequence[float], batches: Sequence[BatchInFlight], num_threads: int
) -> dict[str, float]:
    """Return the seconds of a shard by stage, from the host's clock and the device's.

    Device threads work side by side: a second of one of n threads is the nth part of a second of
    the device.

    Args:
        times: When the shard was begun, read, tokenised, encoded and written.
        batches: Batches of the shard, done.
        num_threads: Number of device threads.
    """
    read, tokenise, device, write = (end - begin for begin, end in pairwise(times))
    idle, forward, pool = (
        sum(batch.seconds[stage] for batch in batches) / num_threads
        for stage in ("idle", "forward", "pool")
    )
    return {
        "read": read,
        "tokenise": tokenise,
        "queued": max(0.0, device - forward - pool),
        "idle": idle,
        "forward": forward,
        "pool": pool,
        "write": write,
    }
