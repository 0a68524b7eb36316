"""The threads of a device: how many, how wide, and what they leave alone."""

import threading
import time
from contextvars import ContextVar

import pytest
import torch

from pipeline.workers.device_threads import MOST_DEVICE_THREADS, DeviceThreads
from tests.support.commands import HANG_S

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "threads", "count", "width"),
    [
        ("cpu", 1, 1, 1),
        ("cpu", 3, 3, 1),
        ("cpu", 2 * MOST_DEVICE_THREADS, MOST_DEVICE_THREADS, 2),
        ("cuda", 3, 1, 3),
    ],
)
def test_device_threads_share_the_cores_and_run_at_once(device, threads, count, width):
    usual = torch.get_num_threads()
    pool = DeviceThreads(torch.device(device), threads)
    meet = threading.Barrier(count)

    def look():
        meet.wait(HANG_S)  # passed only if all threads are in here
        torch.ones(1 << 20).sum()  # a parallel region must not bring back the default
        return torch.get_num_threads()

    assert [f.result(HANG_S) for f in [pool.submit(look) for _ in range(count)]] == [width] * count
    assert pool.count == count
    pool.stop()
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(look)
    assert torch.get_num_threads() == usual


def test_later_threads_have_what_they_would_have_had():
    usual = torch.get_num_threads()
    DeviceThreads(CPU, usual + 1).stop()
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [usual]


def test_by_default_all_threads_are_used():
    pool = DeviceThreads(CPU)
    width = pool.submit(torch.get_num_threads).result()
    assert pool.count * width == torch.get_num_threads()
    pool.stop()


def test_results_come_in_the_order_of_the_items():
    pool = DeviceThreads(CPU, 3)
    waits = [0.05, 0.0, 0.02, 0.0, 0.01]
    assert pool.map(lambda wait: time.sleep(wait) or wait, waits) == waits
    pool.stop()


def test_work_sees_the_callers_context_and_hands_its_error_back():
    shard = ContextVar("shard", default="none")
    pool = DeviceThreads(CPU, 1)
    shard.set("s7")
    assert pool.submit(shard.get).result() == "s7"
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 1, 0).result()
    pool.stop()
