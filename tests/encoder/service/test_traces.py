"""The spans of real requests, and collectors that do not answer."""

import io
import json
import logging
import os
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kalm_encoder import tracing
from kalm_encoder.service.settings import Settings
from pipeline.logs import JsonFormatter
from tests.support.commands import HANG_S
from tests.support.serving import serving, serving_here, wait_until

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e47", "00f067aa0ba902"
IDS = [f"p{i}" for i in range(60)]
REQUESTS = 3


def traceparent(number, *, sampled=True):
    return f"00-{TRACE}{number:02x}-{SPAN}{number:02x}-0{int(sampled)}"


@pytest.fixture
def exporter(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    exporter = InMemorySpanExporter()
    tracing.start("test", exporter)
    yield exporter
    tracing.stop()


def by_trace(exporter):
    """The spans by trace and name, children of the request; a name may occur twice."""
    found = {}
    for span in exporter.get_finished_spans():
        trace = found.setdefault(f"{span.context.trace_id:032x}", {})
        trace.setdefault(span.name, []).append(span)
    return found


@pytest.fixture
def shared(small_table, exporter):
    """The answers and spans of concurrent requests of ids that share one batch, the last of which
    its client does not want recorded; of one with a text; and of an unknown id."""
    with serving_here(Settings(str(small_table), with_encoder=True)) as (client, app):
        decoder, free = app.state.live.current.decoder, threading.Event()
        with ThreadPoolExecutor() as pool:
            pool.submit(decoder.device.call, lambda: free.wait(HANG_S))
            answers = []
            for number in range(REQUESTS + 1):
                headers = {"traceparent": traceparent(number, sampled=number < REQUESTS)}
                if number == 1:
                    headers["X-Request-ID"] = "mine-1"
                ask = {"query": "q", "document_ids": IDS[number : number + 1], "ratio": 8}
                answers.append(pool.submit(client.post, "/v2/rerank", json=ask, headers=headers))
                wait_until(lambda n=number: len(decoder.queue) == n + 1)
            free.set()
            answers = [answer.result() for answer in answers]
        text = {"query": "q", "documents": ["a text that came along"]}
        answers.append(client.post("/rerank", json=text, headers={"X-Request-ID": "a b"}))
        answers.append(client.post("/rerank", json={"query": "q", "document_ids": ["none"]}))
        assert client.get("/health").headers["X-Request-ID"]
    tracing.stop()
    return answers, by_trace(exporter)


def test_spans_of_requests_that_share_a_batch(shared):
    answers, traces = shared
    assert [a.status_code for a in answers] == [200] * (REQUESTS + 2) + [422]
    servers, decodes = [], []
    for number, answer in enumerate(answers[:REQUESTS]):
        spans = traces[f"{TRACE}{number:02x}"]
        (server,), (take,), (decode,) = spans.pop("POST /v2/rerank"), spans["take"], spans["decode"]
        assert (server.kind, f"{server.parent.span_id:016x}") == (
            SpanKind.SERVER,
            f"{SPAN}{number:02x}",
        )
        assert server.attributes["http.route"] == "/v2/rerank"
        assert server.attributes["http.response.status_code"] == 200
        assert server.status.status_code == StatusCode.UNSET
        # The client finds the trace by the answer, and its own id comes back.
        context = f"{server.context.trace_id:032x}-{server.context.span_id:016x}"
        assert answer.headers["traceresponse"] == f"00-{context}-01"
        own = "mine-1" if number == 1 else f"{TRACE}{number:02x}"
        assert answer.headers["X-Request-ID"] == server.attributes["kalm.request_id"] == own
        children = [span for kind in spans.values() for span in kind]
        assert {span.parent.span_id for span in children} == {server.context.span_id}
        assert [s.attributes["kalm.queue"] for s in spans["queue"]] == ["thread", "decode"]
        assert set(spans) == {"take", "queue", "decode"}
        assert [take.attributes[f"kalm.rows{of}"] for of in ("", ".located", ".fetched")] == [
            1,
            1,
            1,
        ]
        assert (take.attributes["kalm.ratio"], take.attributes["kalm.bytes"] > 0) == (8, True)
        assert spans["queue"][1].end_time == decode.start_time
        servers.append(server.context.span_id)
        decodes.append(decode)
    for decode in decodes:
        assert decode.attributes["kalm.batch.size"] == REQUESTS + 1
        assert decode.attributes["kalm.items"] == 1
        assert 0 <= decode.attributes["kalm.batch.padding"] < 1
        assert decode.start_time == decodes[0].start_time
    # One of them names all other requests, and theirs name that one.
    assert [link.context.span_id for link in decodes[0].links] == servers[1:]
    first = decodes[0].context.span_id
    assert all([link.context.span_id for link in d.links] == [first] for d in decodes[1:])


def test_a_trace_that_is_not_sampled_has_no_spans_but_keeps_its_id(shared):
    answers, traces = shared
    trace = f"{TRACE}{REQUESTS:02x}"
    assert trace not in traces
    assert answers[REQUESTS].headers["X-Request-ID"] == trace
    assert answers[REQUESTS].headers["traceresponse"].startswith(f"00-{trace}-")


def test_texts_have_a_span_of_encoding_and_errors_of_the_client_are_none_of_ours(shared):
    answers, traces = shared
    text, missing = (traces[answer.headers["X-Request-ID"]] for answer in answers[-2:])
    (encode,) = text["encode"]
    assert (encode.attributes["kalm.batch.size"], encode.links) == (1, ())
    assert [s.attributes["kalm.queue"] for s in text["queue"]] == ["thread", "encode", "decode"]
    (server,) = missing["POST /rerank"]
    assert server.parent is None
    assert server.attributes["http.response.status_code"] == 422
    assert server.status.status_code == StatusCode.UNSET
    assert not {"GET /health", "/health"} & {name for trace in traces.values() for name in trace}


def test_the_log_line_of_a_failed_request_has_its_trace_and_its_id(small_table, tmp_path, exporter):
    table = shutil.copytree(small_table, tmp_path / "t.lance")
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(JsonFormatter())
    logging.getLogger("kalm_encoder").addHandler(handler)
    try:
        with serving_here(Settings(str(table))) as (client, _):
            shutil.rmtree(table / "data")
            ask = {"query": "q", "document_ids": IDS[:2]}
            headers = {"traceparent": traceparent(0), "X-Request-ID": "mine"}
            answer = client.post("/rerank", json=ask, headers=headers)
    finally:
        logging.getLogger("kalm_encoder").removeHandler(handler)
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (500, "mine")
    assert "the log of the server says why" in answer.json()["message"]
    lines = map(json.loads, handler.stream.getvalue().splitlines())
    (line,) = [line for line in lines if line["message"] == "a request failed"]
    assert (line["trace"], line["request"]) == (f"{TRACE}00", "mine")
    tracing.stop()
    (server,) = by_trace(exporter)[f"{TRACE}00"]["POST /rerank"]
    assert server.status.status_code == StatusCode.ERROR
    assert server.attributes["error.type"] and server.attributes["http.response.status_code"] == 500


@pytest.mark.parametrize("accepts", [False, True])
def test_a_dead_collector_changes_neither_answers_nor_the_exit_code(small_table, tmp_path, accepts):
    ask, log = {"query": "q", "document_ids": IDS}, tmp_path / "log"
    with socket.socket() as collector:
        collector.bind(("127.0.0.1", 0))
        if accepts:
            collector.listen()  # a connection is made, but nobody reads from it
        where = f"http://127.0.0.1:{collector.getsockname()[1]}"
        dead = {"OTEL_EXPORTER_OTLP_ENDPOINT": where, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        # Ten spans wait at most, and the eight requests have more.
        small = {"OTEL_BSP_MAX_QUEUE_SIZE": "10", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "5"}
        with serving(small_table, log=log, **dead, **small) as client:
            answers = [client.post("/rerank", json=ask) for _ in range(8)]
            client.process.send_signal(signal.SIGTERM)
            assert client.process.wait(HANG_S) == 0
    assert {answer.status_code for answer in answers} == {200}
    assert all("traceresponse" in answer.headers for answer in answers)
    with serving(small_table) as client:
        right = client.post("/rerank", json=ask)
    assert "traceresponse" not in right.headers
    assert all(answer.json()["results"] == right.json()["results"] for answer in answers)
    assert "spans are not sent" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_TRACES_EXPORTER": "nothing"}, "no installed package has an exporter 'nothing'"),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "no traces are sent"),
    ],
)
def test_no_spans_are_made_unless_the_environment_asks_for_them_rightly(
    monkeypatch, caplog, environment, said
):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracing.start("test")
    try:
        with tracing.entry("root", {}, {}) as span:
            assert span is None
            assert tracing.trace_id() == ""
    finally:
        tracing.stop()
    assert (said in caplog.text) if said else not caplog.text
