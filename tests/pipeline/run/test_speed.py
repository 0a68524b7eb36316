"""Speed and ETA on a simulated clock: workers that take shards from one queue."""

import heapq
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.records import ShardRecord
from pipeline.run.speed import LEAST_SHARDS, WINDOW_S, WorkerSpeed, eta

TOKENS, SIZE, START_UP_S = 10_000, 1000, 45.0


def simulate(num_workers, num_shards, speed, *, spread=0.0, seed=0):
    """Return arrivals (at, worker, tokens, worked seconds) in order; `speed` is of one worker."""
    rng = random.Random(seed)
    free = [(START_UP_S, f"w{i}") for i in range(num_workers)]
    arrivals = []
    for _ in range(num_shards):
        now, worker = heapq.heappop(free)
        tokens = int(TOKENS * math.exp(spread * rng.gauss(0, 1)))
        took = tokens / speed(now) * math.exp(spread * rng.gauss(0, 1))
        arrivals.append((now + took, worker, tokens, took))
        heapq.heappush(free, (now + took, worker))
    return sorted(arrivals)


def arrived(at, worker, tokens, took):
    return ShardRecord("run", at, 0, 10, 0, tokens, tokens, 0, {"forward": took}, worker)


def etas(arrivals, *, left=0, every=7.0):
    """Yield (now, workers, eta) all along a run of which these are the arrivals."""
    workers, left = {}, len(arrivals) * SIZE + left
    now, come = 0.0, 0
    while now < arrivals[-1][0]:
        while come < len(arrivals) and arrivals[come][0] <= now:
            at, worker, tokens, took = arrivals[come]
            workers.setdefault(worker, WorkerSpeed()).add(arrived(at, worker, tokens, took), SIZE)
            left -= SIZE
            come += 1
        yield now, workers.values(), eta(workers.values(), left, now)
        now += every


def tokens_per_s(workers, now):
    return sum(worker.tokens_per_s(now) for worker in workers)


@given(st.integers(1, 12), st.integers(8, 25), st.floats(10, 5000))
def test_at_constant_speed_the_eta_is_right_from_the_first_one_on(workers, rounds, speed):
    arrivals = simulate(workers, workers * rounds, lambda now: speed)
    end, shard_s = arrivals[-1][0], TOKENS / speed
    told = 0
    for now, seen, found in etas(arrivals, every=(end / 150)):
        if found is None:
            assert now <= START_UP_S + (LEAST_SHARDS + 1) * shard_s
            continue
        told += 1
        # Right but for the shards that are under way, which nothing is known of.
        assert abs(found.value - (end - now)) <= shard_s + 1e-6 * end
        assert math.isclose(tokens_per_s(seen, now), workers * speed, rel_tol=1e-6)
        assert found.low - 1e-6 * end <= end - now <= found.high + 1e-6 * end
    assert told > 10  # of 150 looks; the shortest run lasts 16 s behind a start-up of 45


@given(st.integers(1, 8), st.sampled_from([0.3, 0.5, 2.0, 4.0]))
def test_after_a_change_of_speed_it_follows_within_the_window(workers, change):
    change_at, speed = 600.0, 2000.0
    arrivals = simulate(
        workers, workers * 400, lambda now: speed * (1 if now < change_at else change)
    )
    end, shard_s = arrivals[-1][0], TOKENS / speed / min(1, change)
    settled = change_at + max(WINDOW_S, LEAST_SHARDS * shard_s) + 2 * shard_s
    after = [(now, seen, found) for now, seen, found in etas(arrivals) if settled < now < end]
    assert len(after) > 5
    for now, seen, found in after:
        assert math.isclose(tokens_per_s(seen, now), workers * speed * change, rel_tol=1e-6)
        assert abs(found.value - (end - now)) <= shard_s + 1e-6 * end


@given(st.integers(1, 16), st.floats(0.0, 1.0), st.integers(0, 2**32))
def test_it_is_never_negative_and_lies_in_its_interval(workers, spread, seed):
    arrivals = simulate(workers, 40, lambda now: 700.0, spread=spread, seed=seed)
    for now, seen, found in etas(arrivals):
        assert tokens_per_s(seen, now) >= 0
        if found is not None:
            assert 0 <= found.low <= found.value <= found.high < math.inf


def test_with_noisy_shards_the_interval_holds_what_comes():
    for workers in (1, 4, 16):
        held = told = 0
        for seed in range(12):
            arrivals = simulate(workers, 25 * workers, lambda now: 500.0, spread=0.3, seed=seed)
            for now, _, found in etas(arrivals, every=arrivals[-1][0] / 60):
                if found is not None:
                    told += 1
                    held += found.low <= arrivals[-1][0] - now <= found.high
        assert told > 400
        assert held / told >= 0.9, workers


def test_a_run_that_stalls_does_not_promise_an_end():
    arrivals = simulate(2, 40, lambda now: 1000.0)
    *_, (now, seen, before) = etas(arrivals, left=40 * SIZE)
    later = [eta(seen, 40 * SIZE, now + s).value for s in (100, 1000, 10_000)]
    assert later == sorted(later)
    assert later[-1] > 10 * before.value
    assert tokens_per_s(seen, now + 10_000) < 0.02 * tokens_per_s(seen, now)


def test_nothing_left_is_no_time_and_nothing_seen_is_unknown():
    assert eta([], SIZE, 5.0) is None
    worker = WorkerSpeed()
    worker.add(arrived(10.0, "w", TOKENS, 4.0), SIZE)
    assert eta([worker], 0, 10.0).value == 0
    assert worker.tokens_per_s(10.0) == TOKENS / 4, "start-up does not count"
