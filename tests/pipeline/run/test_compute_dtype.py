"""A table keeps the dtype in which its states were computed, whoever computes the rest of them."""

from dataclasses import replace

import numpy as np
import pytest

from kalm_encoder import PassageEncoder, PassageTable
from kalm_encoder.errors import MismatchError
from kalm_encoder.table.location import Location
from kalm_encoder.table.spec import TableSpec
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.upkeep.sync import sync
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.encode_work import EncodeWork
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus

TEXTS = make_texts(12, seed=3)


def recorded(uri):
    return TableSpec.from_metadata(Location(str(uri)).dataset().schema.metadata, str(uri))


def killed_after_one_shard(work, shards):
    yield from in_process(work, shards[:1])
    raise KeyboardInterrupt


def in_dtype(dtype):
    """An executor whose workers compute in `dtype` where the run does not say in which."""

    def execute(work, units):
        if isinstance(work, EncodeWork):
            chosen = work.spec.compute_dtype or dtype
            work = replace(work, spec=replace(work.spec, compute_dtype=chosen))
        yield from in_process(work, units)

    return execute


@pytest.fixture
def job(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", TEXTS)
    uri = str(tmp_path / "t.lance")
    return EncodeJob(
        inputs=(str(corpus),), uri=uri, model=str(model_dir), shard_size=4, commit_every_s=0
    )


def test_a_resume_a_sync_and_a_truncation_keep_the_dtype(job, model_dir, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(replace(job, compute_dtype="bfloat16"), killed_after_one_shard)
    assert recorded(job.uri).compute_dtype == "bfloat16"
    for other in (run, sync):  # a table that is begun, and one that is complete
        with pytest.raises(MismatchError, match="bfloat16") as caught:
            other(replace(job, compute_dtype="float32"), in_dtype("float32"))
        assert caught.value.field == "compute_dtype"
        run(job, in_dtype("float32"))
    write_corpus(tmp_path / "c.jsonl", [*TEXTS[:-1], "another text"])
    assert sync(job, in_dtype("float32"))[0].changed == 1
    half = PassageEncoder(str(model_dir), dtype="bfloat16").encode(["another text"])[0]
    stored = PassageTable.open(job.uri).take(["p11"])[0]
    assert np.array_equal(stored.states, half.states.astype(np.float16))
    truncate(job.uri, str(tmp_path / "r8.lance"), ratios=(8,))
    assert recorded(tmp_path / "r8.lance").compute_dtype == "bfloat16"


def test_verify_expects_of_each_dtype_what_it_can_give(job, model_dir):
    run(replace(job, compute_dtype="bfloat16"), in_process)
    same = verify(job.uri, sample=12, model=str(model_dir))
    other = verify(job.uri, sample=12, model=str(model_dir), dtype="float32")
    assert (same.num_problems, other.num_problems) == (0, 0)
    assert same.largest_state_error < 1e-2 / 4 < other.largest_state_error


def test_workers_that_choose_different_dtypes_are_told_to_agree(job):
    def mixed(config, shards):
        for shard, dtype in zip(shards, ("float32", "bfloat16"), strict=False):
            yield from in_dtype(dtype)(config, [shard])

    with pytest.raises(MismatchError, match=r"computes in bfloat16, the states .* in float32"):
        run(job, mixed)
    assert recorded(job.uri).compute_dtype == "float32"
    assert run(job, in_dtype("bfloat16")).shards_encoded == 2, "what was computed before is kept"
    assert verify(job.uri, sample=12).largest_state_error < 1e-3
