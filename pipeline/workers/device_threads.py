"""The threads in which one device runs its forwards."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

MOST_DEVICE_THREADS = 8
"""Each holds the activations of a batch; beyond it lanes get more than one thread each."""

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


class DeviceThreads:
    """Threads of their own for a device: one for a GPU, one a core for a CPU.

    On a CPU each runs a forward alone. Where several threads share a forward, each product ends
    with the slowest of them: whatever else takes a core for a moment stops all (measured with two
    cores: 1.2 times slower on an idle machine, 1.4 with a process that takes 5 % of it).

    Args:
        device: that the forwards run on.
        threads: of the CPU to use; None takes as many as torch would.

    Attributes:
        count: forwards that run at once.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        usual = torch.get_num_threads()
        threads = threads or usual
        self.count = min(threads, MOST_DEVICE_THREADS) if device.type == "cpu" else 1
        self._width = threads // self.count
        self._all_ready = threading.Barrier(self.count)
        self._pool = ThreadPoolExecutor(self.count, "device", initializer=self._begin)
        for future in [self._pool.submit(int) for _ in range(self.count)]:
            future.result()
        torch.set_num_threads(usual)  # for threads to come, which take over what was set last

    def _begin(self) -> None:
        torch.get_num_threads()  # else the first parallel region of this thread sets it anew
        torch.set_num_threads(self._width)
        self._all_ready.wait()

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Do some work in the next free lane, first come, first served.

        Log lines name the shard that the caller's do.
        """
        context = contextvars.copy_context()
        return self._pool.submit(lambda: context.run(work, *args, **kwargs))

    def map(self, work: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
        """Do some work on each item, in as many lanes as are free; wait for all, in their order."""
        sent = [self.submit(work, item) for item in items]
        return [one.result() for one in sent]

    def stop(self) -> None:
        """Take no more work; what was submitted is still done."""
        self._pool.shutdown(wait=False)
