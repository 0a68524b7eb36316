"""Speed and ETA on a simulated clock: workers that take shards from one queue."""

import heapq
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.pace import LEAST_SHARDS, WINDOW_S, Pace

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


def etas(arrivals, *, left=0.0, every=7.0):
    """Yield (now, pace, eta) all along a run of which these are the arrivals."""
    pace = Pace(len(arrivals) * SIZE + left)
    now, come = 0.0, 0
    while now < arrivals[-1][0]:
        while come < len(arrivals) and arrivals[come][0] <= now:
            at, worker, tokens, took = arrivals[come]
            pace.add(worker, at, tokens=tokens, size=SIZE, worked_s=took)
            come += 1
        yield now, pace, pace.eta(now)
        now += every


@given(st.integers(1, 12), st.integers(8, 25), st.floats(10, 5000))
def test_at_constant_speed_the_eta_is_right_from_the_first_one_on(workers, rounds, speed):
    arrivals = simulate(workers, workers * rounds, lambda now: speed)
    end, shard_s = arrivals[-1][0], TOKENS / speed
    told = 0
    for now, pace, eta in etas(arrivals, every=(end / 150)):
        if eta is None:
            assert now <= START_UP_S + (LEAST_SHARDS + 1) * shard_s
            continue
        told += 1
        # Workers that began together end together: within a shard, exactly where there is one.
        off = 1e-6 if workers == 1 else shard_s
        assert abs(eta.value - (end - now)) <= off + 1e-6 * end
        assert math.isclose(pace.tokens_per_s(now), workers * speed, rel_tol=1e-6)
        assert eta.low - 1e-6 * end <= end - now <= eta.high + 1e-6 * end
    assert told > 10  # of 150 looks; the shortest run lasts 16 s behind a start-up of 45


@given(st.integers(1, 8), st.sampled_from([0.3, 0.5, 2.0, 4.0]))
def test_after_a_change_of_speed_it_follows_within_the_window(workers, change):
    change_at, speed = 600.0, 2000.0
    arrivals = simulate(
        workers, workers * 400, lambda now: speed * (1 if now < change_at else change)
    )
    end, shard_s = arrivals[-1][0], TOKENS / speed / min(1, change)
    settled = change_at + WINDOW_S + 2 * shard_s
    after = [(now, pace, eta) for now, pace, eta in etas(arrivals) if settled < now < end]
    assert len(after) > 5
    for now, pace, eta in after:
        assert math.isclose(pace.tokens_per_s(now), workers * speed * change, rel_tol=1e-6)
        assert abs(eta.value - (end - now)) <= shard_s


@given(st.integers(1, 16), st.floats(0.0, 1.0), st.integers(0, 2**32))
def test_it_is_never_negative_and_lies_in_its_interval(workers, spread, seed):
    arrivals = simulate(workers, 40, lambda now: 700.0, spread=spread, seed=seed)
    for _, pace, eta in etas(arrivals):
        assert pace.tokens_per_s(START_UP_S) >= 0
        if eta is not None:
            assert 0 <= eta.low <= eta.value <= eta.high


def test_with_noisy_shards_the_interval_holds_what_comes():
    for workers in (1, 4, 16):
        held = told = 0
        for seed in range(12):
            arrivals = simulate(workers, 25 * workers, lambda now: 500.0, spread=0.3, seed=seed)
            for now, _, eta in etas(arrivals, every=arrivals[-1][0] / 60):
                if eta is not None:
                    told += 1
                    held += eta.low <= arrivals[-1][0] - now <= eta.high
        assert told > 400
        assert held / told >= 0.9, workers


def test_a_run_that_stalls_does_not_promise_an_end():
    arrivals = simulate(2, 40, lambda now: 1000.0)
    *_, (now, pace, before) = etas(arrivals, left=40 * SIZE)
    later = [pace.eta(now + s).value for s in (100, 1000, 10_000)]
    assert later == sorted(later)
    assert later[-1] > 10 * before.value
    assert pace.tokens_per_s(now + 10_000) < 0.02 * pace.tokens_per_s(now)


def test_nothing_left_is_no_time_and_nothing_seen_is_unknown():
    pace = Pace(SIZE)
    assert pace.eta(5.0) is None
    assert pace.tokens_per_s(5.0) == 0
    pace.add("w", 10.0, tokens=TOKENS, size=SIZE, worked_s=4.0)
    assert pace.eta(10.0).value == 0
    assert pace.tokens_per_s(10.0) == TOKENS / 4
