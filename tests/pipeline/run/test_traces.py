"""The spans of a run and of its shards."""

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kalm_encoder import tracing
from kalm_encoder.errors import IncompleteError
from pipeline.workers.shard_encoder import ShardEncoder
from tests.conftest import encode_table, make_texts, write_corpus

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
STAGES = {"read", "tokenise", "queued", "idle", "forward", "pool", "write"}


@pytest.fixture
def exporter(monkeypatch):
    monkeypatch.setenv("TRACEPARENT", CALLER)
    exporter = InMemorySpanExporter()
    tracing.start("test", exporter)
    yield exporter
    tracing.stop()


def test_each_shard_is_a_child_of_its_run_also_one_that_fails(
    model_dir, tmp_path, exporter, monkeypatch
):
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(30))
    real = ShardEncoder._write

    def fails_on_the_second(self, shard, *rows):
        if shard.number == 1:
            raise OSError("the disk: secret")
        return real(self, shard, *rows)

    monkeypatch.setattr(ShardEncoder, "_write", fails_on_the_second)
    with pytest.raises(IncompleteError):
        encode_table(model_dir, corpus, tmp_path / "t.lance", shard_size=10)
    tracing.stop()
    spans = exporter.get_finished_spans()
    (run,) = [span for span in spans if span.name == "run"]
    shards = [span for span in spans if span.name == "shard"]
    assert len(shards) == 3
    assert f"{run.context.trace_id:032x}-{run.parent.span_id:016x}" == CALLER[3:-3]
    assert run.attributes["kalm.shards.pending"] == 3
    assert run.attributes["error.type"] == "IncompleteError"
    assert {(s.context.trace_id, s.parent.span_id) for s in shards} == {
        (run.context.trace_id, run.context.span_id)
    }
    done = [span for span in shards if span.status.status_code == StatusCode.UNSET]
    (failed,) = [span for span in shards if span not in done]
    assert failed.attributes["error.type"] == "OSError"
    assert "secret" not in failed.to_json()
    for span in done:
        assert span.attributes["kalm.rows"] == 10
        assert {n.removeprefix("kalm.seconds.") for n in span.attributes} >= STAGES
        assert run.start_time <= span.start_time < span.end_time <= run.end_time
