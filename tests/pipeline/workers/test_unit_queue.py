"""In which order shards go to workers, and whose failures count."""

import pytest

from kalm_encoder.errors import InputError
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Shard
from pipeline.messages import STEP_IN_FLIGHT
from pipeline.workers.on_ray.cluster import RayOptions, WorkerResources, worker_resources
from pipeline.workers.unit_queue import UnitQueue, short_last


def shard(number, length=100, path="a.jsonl"):
    rows = RowRange(0, length, 1, 1, f"{number:032x}")
    return Shard(number, InputFile(path, "jsonl"), Fields("id", "text"), rows)


def numbers(shards):
    return [s.number for s in shards]


def test_the_shortest_go_last_and_the_others_stay_in_plan_order():
    lengths = [100, 40, 90, 100, 7, 100]
    first, last = short_last([shard(i, n) for i, n in enumerate(lengths)], 3)
    assert numbers(first) == [0, 3, 5]
    assert numbers(last) == [2, 1, 4]


def test_equal_shards_stay_in_plan_order():
    first, last = short_last([shard(i) for i in range(5)], 2)
    assert numbers([*first, *last]) == [0, 1, 2, 3, 4]


def test_shards_of_compressed_files_are_not_taken_out_of_their_file():
    shards = [shard(0), shard(1, 1, "b.jsonl.gz"), shard(2, 50), shard(3)]
    first, last = short_last(shards, 1)
    assert numbers(first) == [0, 1, 3]
    assert numbers(last) == [2]


def test_rows_and_bytes_are_compared_with_their_own_kind():
    texts = [shard(i, 9000) for i in range(3)]
    rows = [shard(3, 1000, "c.parquet"), shard(4, 1000, "c.parquet"), shard(5, 10, "c.parquet")]
    _, last = short_last([*texts, *rows], 1)
    assert numbers(last) == [5]


def test_a_worker_stays_in_its_file_and_then_helps_where_most_is_left():
    shards = [shard(i, path="a.jsonl.gz") for i in range(2)]
    shards += [shard(i, path="b.jsonl.gz") for i in range(2, 6)]
    queue = UnitQueue(shards, [shard(6)])
    one, two = queue.take(""), queue.take("")
    assert (one.number, two.number) == (0, 2)
    assert [queue.take("a.jsonl.gz").number for _ in range(2)] == [1, 3]
    assert [queue.take("b.jsonl.gz").number for _ in range(3)] == [4, 5, 6]
    assert len(queue) == 0


def test_a_shard_that_raises_is_given_up_with_its_last_reason():
    queue = UnitQueue([shard(0), shard(1)])
    assert queue.failed(queue.take(""), "first") == []
    assert queue.take("a.jsonl").number == 1  # others go before it
    assert queue.failed(queue.take("a.jsonl"), "second") == []
    (failure,) = queue.failed(queue.take("a.jsonl"), "third")
    assert (failure.unit.number, failure.attempts, failure.reason) == (0, 3, "third")


def test_a_shard_whose_node_went_away_is_never_given_up():
    queue = UnitQueue([shard(0)])
    for _ in range(10):  # the worker is seen to die first, its node a moment later
        lost = queue.take("")
        assert queue.failed(lost, "lost connection", "node") == []
        assert len(queue.suspects) == 1
        queue.clear_suspects({"node"})
        assert len(queue.suspects) == 1
        queue.clear_suspects({"another"})
        assert (len(queue.suspects), len(queue)) == (0, 1)


def test_workers_share_a_gpu_but_never_lie_across_two():
    nodes = {"n": {"CPU": 16.0, "GPU": 2.0}, "head": {"CPU": 8.0}}
    assert WorkerResources(1, 0.5).room(nodes) == 4
    assert WorkerResources(1, 0.4).room(nodes) == 4
    assert WorkerResources(1, 1).room(nodes) == 2
    assert WorkerResources(4, 0).room(nodes) == 6


def test_a_step_without_a_model_asks_for_one_cpu_and_no_gpu():
    nodes = {"n": {"CPU": 6.0, "GPU": 2.0}}
    step = worker_resources(RayOptions(), nodes, loads_model=False)
    assert (step.cpus, step.gpus, step.room(nodes), step.in_flight) == (1, 0, 6, STEP_IN_FLIGHT)


def test_a_gpu_worker_takes_its_share_of_the_cpus():
    nodes = {"n": {"CPU": 6.0, "GPU": 2.0}, "head": {"CPU": 64.0}}
    assert worker_resources(RayOptions(), nodes) == WorkerResources(3, 1.0)
    nodes = {"n": {"CPU": 96.0, "GPU": 8.0}}
    assert worker_resources(RayOptions(), nodes) == WorkerResources(12, 1.0)
    half = RayOptions(gpus_per_worker=0.5)
    assert worker_resources(half, nodes) == WorkerResources(6, 0.5)
    nodes = {"n": {"CPU": 224.0, "GPU": 8.0}}
    assert worker_resources(RayOptions(), nodes) == WorkerResources(16, 1.0)
    assert worker_resources(half, nodes) == WorkerResources(8, 0.5)
    assert worker_resources(RayOptions(), {"n": {"CPU": 2.0}}) == WorkerResources(2, 0)


def test_a_gpu_worker_has_a_shard_for_each_of_its_cpus():
    assert [WorkerResources(cpus, 1.0).in_flight for cpus in (1, 3, 12)] == [3, 3, 12]
    assert WorkerResources(12, 0).in_flight == 3


def test_requests_that_cannot_be_met_are_named():
    nodes = {"n": {"CPU": 4.0, "GPU": 1.0}}
    with pytest.raises(InputError, match="8 CPUs and 1 GPUs; the nodes are 1 of 4 CPUs and 1"):
        worker_resources(RayOptions(cpus_per_worker=8), nodes)
    with pytest.raises(InputError, match=r"--gpus-per-worker -1 must be between 0 and 1"):
        worker_resources(RayOptions(gpus_per_worker=-1), nodes)
    with pytest.raises(InputError, match="--workers -1"):
        worker_resources(RayOptions(num_workers=-1), nodes)
    with pytest.raises(InputError, match="--cpus-per-worker 0"):
        worker_resources(RayOptions(cpus_per_worker=0), nodes)


@pytest.mark.parametrize("gpus", [1.5, 2])
def test_more_than_one_gpu_per_worker_is_refused_since_it_could_not_use_them(gpus):
    nodes = {"n": {"CPU": 16.0, "GPU": 4.0}}
    with pytest.raises(InputError, match=rf"--gpus-per-worker {gpus:g} must be between 0 and 1"):
        worker_resources(RayOptions(gpus_per_worker=gpus), nodes)
