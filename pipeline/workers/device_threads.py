"""The threads in which one device runs its forwards, and the memory those forwards use again."""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_DEVICE_THREADS = 8
"""Each device thread holds the activations of a batch; with more cores each gets several cores."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc

T = TypeVar("T")
Item = TypeVar("Item")


class DeviceThreads:
    """Threads that run forwards: one for a GPU, one per core for a CPU.

    On a CPU each thread runs a forward alone. If several threads shared a forward, each product
    would end with the slowest of them: whatever else takes a core for a moment would stop all
    (measured with two cores: 1.2 times slower on an idle machine, 1.4 times beside a process that
    takes 5 % of it).

    Args:
        device: Device that the forwards run on.
        threads: Number of CPU threads to use. None takes as many as torch would.

    Attributes:
        count: Number of forwards that run at once.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        usual = torch.get_num_threads()
        threads = threads or usual
        self.count = min(threads, MOST_DEVICE_THREADS) if device.type == "cpu" else 1
        self._threads_per_forward = threads // self.count
        self._all_ready = threading.Barrier(self.count)
        self._pool = ThreadPoolExecutor(self.count, "device", initializer=self._begin)
        for future in [self._pool.submit(int) for _ in range(self.count)]:
            future.result()
        torch.set_num_threads(usual)  # threads to come take over what was set last

    def _begin(self) -> None:
        torch.get_num_threads()  # else the first parallel region of this thread sets it anew
        torch.set_num_threads(self._threads_per_forward)
        self._all_ready.wait()

    def submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        """Run some work in the next free thread, first come, first served.

        Its log lines name the same shard as those of the caller.
        """
        context = contextvars.copy_context()
        return self._pool.submit(context.run, work, *args)

    def map(self, work: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
        """Run some work on each item, in all free threads; return the results in order."""
        futures = [self.submit(work, item) for item in items]
        return [future.result() for future in futures]

    def stop(self) -> None:
        """Finish the forwards under way; those that wait are cancelled and no more are taken."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def keep_freed_memory() -> None:
    """Let malloc keep what a forward on a CPU or a shard frees, for the next one.

    By default glibc gives large blocks back to the system at once, and each activation of each
    layer is paged in and zeroed anew: up to a fifth of a CPU worker's time. Beside a GPU it is the
    states of a shard, which are copied and written. See mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
