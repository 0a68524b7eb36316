"""What HTTP and its authentication (RFC 9110, 9112, 6750) promise to any client."""

import base64
import http.client
import json
import re
import socket

import pytest
from fastapi.testclient import TestClient

from kalm_encoder.errors import InputError
from kalm_encoder.service.access import is_loopback, read_key, read_origins
from kalm_encoder.service.app import create_app
from kalm_encoder.service.settings import Settings
from tests.support.commands import HANG_S
from tests.support.serving import serving
from tests.support.upgrades import ask_as_jdk, ask_with_curl, ask_with_java

ASK = {"query": "q", "document_ids": ["p1", "p2"]}
KEY = "schlüssel"
PAGE = "https://search.example"


@pytest.fixture(scope="module")
def client(small_table, tmp_path_factory):
    log = tmp_path_factory.mktemp("http") / "log"
    with serving(small_table, "--max-body-mb", "1", log=log) as client:
        client.log = log
        yield client


@pytest.fixture(scope="module")
def keyed(small_table):
    """A service with a key, as a file of a secret holds it, and one page that may ask it."""
    with serving(small_table, "--cors-origins", PAGE, KALM_API_KEY=f"{KEY}\n") as client:
        yield client


def raw(client, text):
    """Send bytes and return all that comes back until the server closes the connection."""
    where = client.base_url.host, client.base_url.port
    with socket.create_connection(where, HANG_S) as opened, opened.makefile("rb") as reply:
        opened.sendall(text.encode())
        return reply.read().decode()


@pytest.mark.parametrize("split", [True, False])
def test_an_offer_of_http2_is_ignored_and_the_body_is_read(client, split):
    for status, answer in ask_as_jdk(client.base_url.port, ASK, split=split):
        assert status == 200
        assert len(answer["results"]) == 2
    assert "upgrade" not in client.log.read_text()


@pytest.mark.parametrize("protocol", ["websocket", "TLS/1.0, HTTP/1.1", "anything"])
def test_any_other_offer_is_ignored_too(client, protocol):
    headers = {"Connection": "Upgrade", "Upgrade": protocol}
    headers |= {"Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert client.post("/rerank", json=ASK, headers=headers).status_code == 200


def test_the_http_client_of_java(client, tmp_path):
    for answer in ask_with_java(client.base_url.port, ASK, tmp_path):
        assert len(answer["results"]) == 2


def test_curl_with_http2(client):
    assert len(ask_with_curl(client.base_url.port, ASK)["results"]) == 2


def test_a_client_of_http_1_0_is_answered_and_the_connection_closed(client):
    body = json.dumps(ASK)
    reply = raw(
        client,
        "POST /rerank HTTP/1.0\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}",
    )
    assert reply.split()[1] == "200"
    assert '"results"' in reply


@pytest.mark.parametrize("path", ["/health", "/info", "/metrics", "/openapi.json"])
def test_head_is_answered_as_get_without_the_body(client, path):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, get.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert client.head("/nothing/here").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/rerank", {"POST", "OPTIONS"}),
        ("HEAD", "/score", {"POST", "OPTIONS"}),
        ("DELETE", "/v2/rerank", {"POST", "OPTIONS"}),
        ("POST", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("PUT", "/info", {"GET", "HEAD", "OPTIONS"}),
        ("TRACE", "/metrics", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_method_that_a_path_lacks_is_405_with_those_it_has(client, method, path, allow):
    reply = client.request(method, path)
    assert reply.status_code == 405
    assert set(re.split(r",\s*", reply.headers["Allow"])) == allow
    options = client.options(path)
    assert options.status_code == 204
    assert set(re.split(r",\s*", options.headers["Allow"])) == allow


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"Content-Type": "text/plain"}, ("accept", "application/json")),
        ({"Content-Type": "application/x-www-form-urlencoded"}, ("accept", "application/json")),
        ({}, ("accept", "application/json")),
        (
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            ("accept-encoding", "identity"),
        ),
    ],
)
def test_a_body_that_is_not_plain_json_is_415_and_says_what_to_send(client, headers, says):
    reply = client.post("/rerank", content=json.dumps(ASK), headers=headers)
    assert reply.status_code == 415
    assert reply.headers[says[0]] == says[1]
    assert reply.json()["message"].startswith("send ")


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"]
)
def test_json_by_any_of_its_names_is_read(client, kind):
    reply = client.post("/rerank", content=json.dumps(ASK), headers={"Content-Type": kind})
    assert reply.status_code == 200, reply.text


def test_a_client_that_sends_too_much_still_reads_its_413(client):
    body = b'{"query": "' + b"q" * (64 << 20) + b'"}'
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.request("POST", "/rerank", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 413
    assert "longer than 1048576 bytes" in json.load(reply)["message"]
    connection.close()


def test_a_client_that_asks_first_is_told_413_before_it_sends(client):
    reply = raw(
        client,
        f"POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2 << 20}\r\n"
        "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n",
    )
    assert reply.startswith("HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "127.8.8.8", "[::1]:99", "a.localhost", None],
)
def test_a_host_that_is_this_machine_is_answered(client, host):
    line = "" if host is None else f"Host: {host}\r\n"
    version = "1.0" if host is None else "1.1"
    reply = raw(client, f"GET /info HTTP/{version}\r\n{line}Connection: close\r\n\r\n")
    assert reply.split()[1] == "200", reply


@pytest.mark.parametrize(
    "host",
    ["rebound.example", "localhost.rebound.example:8080", "127.0.0.1.nip.io", "192.168.0.7", "[x"],
)
def test_a_page_cannot_reach_a_loopback_service_by_rebinding_its_name(client, host):
    for path in ("/info", "/health", "/openapi.json", "/nothing"):
        reply = raw(client, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        assert reply.split()[1] == "421"
        assert "set KALM_API_KEY" in reply


def test_with_a_key_any_host_is_answered(keyed):
    assert keyed.get("/health", headers={"Host": "rerank.example"}).status_code == 200
    headers = {"Host": "rerank.example", "Authorization": f"Bearer {KEY}".encode()}
    assert keyed.get("/info", headers=headers).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_of_a_key_is_read_in_any_case(keyed, scheme):
    headers = {"Authorization": f"{scheme} {KEY}".encode()}
    assert keyed.post("/rerank", json=ASK, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("sent", "challenge"),
    [
        (None, 'Bearer realm="kalm"'),
        ("Bearer wrong", 'Bearer realm="kalm", error="invalid_token"'),
        (f"Bearer {KEY}x", 'Bearer realm="kalm", error="invalid_token"'),
        (f"Basic {base64.b64encode(f'user:{KEY}'.encode()).decode()}", 'Bearer realm="kalm"'),
        (KEY, 'Bearer realm="kalm"'),
    ],
)
def test_a_401_says_how_to_authenticate(keyed, sent, challenge):
    headers = {} if sent is None else {"Authorization": sent.encode()}
    reply = keyed.get("/info", headers=headers)
    assert (reply.status_code, reply.headers["WWW-Authenticate"]) == (401, challenge)


def test_probes_need_no_key(keyed):
    assert keyed.get("/health").status_code == 200
    assert keyed.head("/health").status_code == 200


def test_a_page_of_an_allowed_origin_may_ask_and_no_other(keyed):
    asked = {"Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    allowed = keyed.options("/rerank", headers={"Origin": PAGE} | asked)
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in allowed.headers["Access-Control-Allow-Methods"]
    assert {"authorization", "content-type"} <= set(
        re.split(r",\s*", allowed.headers["Access-Control-Allow-Headers"].lower())
    )
    key = {"Authorization": f"Bearer {KEY}".encode()}
    for headers in (key, {}):  # a page must be able to read a 401 too
        reply = keyed.post("/rerank", json=ASK, headers={"Origin": PAGE, **headers})
        assert reply.status_code == (200 if headers else 401)
        assert reply.headers["Access-Control-Allow-Origin"] == PAGE
    other = keyed.options("/rerank", headers={"Origin": "https://other.example"} | asked)
    assert other.status_code == 400
    assert "Access-Control-Allow-Origin" not in other.headers


def test_without_the_option_no_page_of_another_origin_may_read_an_answer(client):
    reply = client.post("/rerank", json=ASK, headers={"Origin": PAGE})
    assert not any(name.lower().startswith("access-control") for name in reply.headers)


def test_an_idle_connection_outlasts_that_of_a_load_balancer(small_table):
    """The option reaches the server: a short time closes the connection, the default does not."""
    with serving(small_table, "--keep-alive-s", "1") as client:
        where = client.base_url.host, client.base_url.port
        with socket.create_connection(where, HANG_S) as opened, opened.makefile("rb") as reply:
            opened.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"connection: close" not in reply.read().lower()  # it ends: the server closed it


@pytest.mark.parametrize("name", ["::1", "127.0.0.1", "localhost", "Localhost.", "x.localhost"])
def test_names_of_this_machine(name):
    assert is_loopback(name)


@pytest.mark.parametrize(
    "name", ["", "0.0.0.0", "::", "10.0.0.1", "localhost.example", "2130706433"]
)
def test_names_that_may_be_another_machine(name):
    assert not is_loopback(name)


def test_a_key_is_read_as_files_of_secrets_hold_it():
    assert read_key("s3cret\r\n") == "s3cret"
    assert read_key(" two words ") == "two words"
    assert read_key(None) is None
    for empty in ("", "\n", " \t"):
        with pytest.raises(InputError, match="KALM_API_KEY is set, but empty: unset it"):
            read_key(empty)
    with pytest.raises(InputError, match="control character"):
        read_key("two\nlines")


def test_an_origin_is_read_as_a_browser_sends_it():
    assert read_origins("https://a.example, http://localhost:3000") == {
        "https://a.example",
        "http://localhost:3000",
    }
    assert read_origins("*") == {"*"}
    assert read_origins(None) == frozenset()
    for wrong in ("a.example", "https://a.example/", "https://", "*.example"):
        with pytest.raises(InputError, match="is no origin"):
            read_origins(wrong)


def test_a_service_that_is_loading_says_when_to_ask_again(small_table):
    client = TestClient(create_app(Settings(str(small_table))))  # not started: nothing is loaded
    for reply in (client.get("/health"), client.get("/info"), client.post("/rerank", json=ASK)):
        assert reply.status_code == 503
        assert int(reply.headers["Retry-After"]) > 0
