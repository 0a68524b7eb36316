"""A small S3 server on files, for tests, with atomic conditional writes and faults on request.

`python -m tests.support.s3_server FOLDER [--port N] [--no-conditional]` prints its port and serves
until it is killed. It is one process with a thread per connection. Each bucket is a folder in
FOLDER. Requests must be signed with the key ACCESS_KEY; the signature is not checked.

`POST /-/faults` with a JSON list of rules replaces the rules, and `GET /-/stats` tells what
happened. A rule is {"action", "match", "skip", "count", "probability", "seconds"}. It applies to
the requests whose "METHOD path?query" the regular expression `match` finds: the first `skip` of
them pass, then `count` are hit, each with `probability`. The actions are error500, error503, drop
(before anything is done), lost_reply (after it is done), delay (of `seconds`), kill_before and
kill_after (SIGKILL to the process that sent the request).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

import psutil

ACCESS_KEY = "test-key"
XML = '<?xml version="1.0" encoding="UTF-8"?>'


class Server(ThreadingHTTPServer):
    """State shared by all connections."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, folder: Path, port: int, conditional: bool) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = folder
        self.uploads = folder / ".uploads"
        self.uploads.mkdir(parents=True, exist_ok=True)
        self.conditional = conditional
        self.lock = threading.Lock()
        self.rules: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.faults: Counter[str] = Counter()
        self.bytes_sent = 0
        self.random = random.Random(0)

    def fault(self, line: str) -> tuple[str | None, float]:
        """Return the action of the rule that hits this request, if any, and its seconds."""
        with self.lock:
            self.requests.append(line)
            for rule in self.rules:
                if rule["count"] < 1 or not re.search(rule["match"], line):
                    continue
                if self.random.random() >= rule["probability"]:
                    continue
                if rule["skip"] > 0:
                    rule["skip"] -= 1
                    continue
                rule["count"] -= 1
                self.faults[rule["action"]] += 1
                return str(rule["action"]), float(rule["seconds"])
        return None, 0.0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that go away, which the tests make them do."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_any(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = {k: v[0] for k, v in parse_qs(query, keep_blank_values=True).items()}
        body = self._body()
        if path.startswith("/-/"):
            return self._control(path, body)
        action, seconds = self.server.fault(f"{self.command} {unquote(self.path)}")
        if action == "drop":
            return self._hang_up()
        if action == "kill_before":
            self._kill_client()
            return self._hang_up()
        if action == "delay":
            time.sleep(seconds)
        if action == "error503":
            return self._error(503, "SlowDown")
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        reply = self._handle(bucket, key, body)
        if action == "error500":
            reply = self._failure(500, "InternalError")
        if action == "kill_after":
            self._kill_client()
            return self._hang_up()
        if action == "lost_reply":
            return self._hang_up()
        self._send(*reply)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def _handle(self, bucket: str, key: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if ACCESS_KEY not in self.headers.get("authorization", ""):
            return self._failure(403, "InvalidAccessKeyId")
        root = self.server.folder / bucket
        if not key and self.command == "PUT":
            root.mkdir(exist_ok=True)
            return 200, {}, b""
        if not root.is_dir():
            return self._failure(404, "NoSuchBucket")
        if ".." in key.split("/"):
            return self._failure(400, "InvalidRequest")
        if not key:
            if self.command == "HEAD":
                return 200, {}, b""
            return self._delete_many(root, body) if self.command == "POST" else self._list(root)
        file = root / key
        if self.command == "DELETE":
            if "uploadId" in self.query:
                shutil.rmtree(self.server.uploads / self.query["uploadId"], ignore_errors=True)
            else:
                file.unlink(missing_ok=True)
            return 204, {}, b""
        if self.command == "POST":
            return self._multipart(file, body)
        return self._put(file, body) if self.command == "PUT" else self._get(file)

    def _put(self, file: Path, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if "uploadId" in self.query:
            folder = self.server.uploads / self.query["uploadId"]
            if not folder.is_dir():
                return self._failure(404, "NoSuchUpload")
            (folder / f"{int(self.query['partNumber']):05d}").write_bytes(body)
            return 200, {"ETag": _quoted(body)}, b""
        source = self.headers.get("x-amz-copy-source")
        if source:
            copied = self.server.folder / unquote(source).lstrip("/")
            if not copied.is_file():
                return self._failure(404, "NoSuchKey")
            body = copied.read_bytes()
        refused = self._store(file, body)
        if refused:
            return refused
        if source:
            return 200, {}, f"{XML}<CopyObjectResult><ETag>x</ETag></CopyObjectResult>".encode()
        return 200, {"ETag": _quoted(body)}, b""

    def _store(self, file: Path, body: bytes) -> tuple[int, dict[str, str], bytes] | None:
        """Put an object in place atomically; with If-None-Match, only if there is none."""
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.server.uploads / uuid.uuid4().hex
        draft.write_bytes(body)
        if self.server.conditional and self.headers.get("if-none-match") == "*":
            try:
                os.link(draft, file)
            except FileExistsError:
                return self._failure(412, "PreconditionFailed")
            finally:
                draft.unlink()
        else:
            draft.replace(file)
        return None

    def _multipart(self, file: Path, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if "uploads" in self.query:
            upload = uuid.uuid4().hex
            (self.server.uploads / upload).mkdir()
            return 200, {}, (
                f"{XML}<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
                "</InitiateMultipartUploadResult>"
            ).encode()  # fmt: skip
        folder = self.server.uploads / self.query["uploadId"]
        if not folder.is_dir():
            return self._failure(404, "NoSuchUpload")
        whole = b"".join(part.read_bytes() for part in sorted(folder.iterdir()))
        refused = self._store(file, whole)
        shutil.rmtree(folder)
        done = f"{XML}<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        return refused or (200, {}, done.encode())

    def _get(self, file: Path) -> tuple[int, dict[str, str], bytes]:
        if not file.is_file():  # a store of objects has no folders
            return self._failure(404, "NoSuchKey")
        stat = file.stat()
        headers = {
            "ETag": f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"',
            "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            return 200, {**headers, "Content-Length": str(stat.st_size)}, b""
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("range", ""))
        if not wanted:
            return 200, headers, file.read_bytes()
        if wanted[1]:
            first, last = int(wanted[1]), min(int(wanted[2] or stat.st_size), stat.st_size - 1)
        else:
            first, last = max(0, stat.st_size - int(wanted[2])), stat.st_size - 1
        if first > last:
            return self._failure(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {first}-{last}/{stat.st_size}"
        with file.open("rb") as opened:
            opened.seek(first)
            return 206, headers, opened.read(last + 1 - first)

    def _delete_many(self, root: Path, body: bytes) -> tuple[int, dict[str, str], bytes]:
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode(), re.DOTALL)
        for key in keys:
            (root / key.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")).unlink(
                missing_ok=True
            )
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        return 200, {}, f"{XML}<DeleteResult>{deleted}</DeleteResult>".encode()

    def _list(self, root: Path) -> tuple[int, dict[str, str], bytes]:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        after = self.query.get("continuation-token") or self.query.get("start-after", "")
        limit = int(self.query.get("max-keys", "1000"))
        base = root / prefix.rpartition("/")[0]
        found = (
            Path(folder, name).relative_to(root).as_posix()
            for folder, _, names in os.walk(base)
            for name in names
        )
        keys = sorted(k for k in found if k.startswith(prefix) and k > after)
        entries: dict[str, str] = {}
        last = ""
        for key in keys:
            head, found_delimiter, _ = key[len(prefix) :].partition(delimiter or "\0")
            shared = bool(found_delimiter)
            name = prefix + head + delimiter if shared else key
            if name not in entries and len(entries) == limit:
                break
            with contextlib.suppress(OSError):
                entries.setdefault(name, _entry(root, name, shared))
            last = key
        cut = bool(keys) and last != keys[-1]
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if cut else ""
        return 200, {}, (
            f"{XML}<ListBucketResult><Name>{root.name}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(entries)}</KeyCount><MaxKeys>{limit}</MaxKeys>"
            f"<IsTruncated>{str(cut).lower()}</IsTruncated>{token}{''.join(entries.values())}"
            "</ListBucketResult>"
        ).encode()  # fmt: skip

    def _body(self) -> bytes:
        """Read the body of the request, chunked or not, and undo S3's own chunking."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not self.headers.get("x-amz-content-sha256", "").startswith("STREAMING"):
            return body
        whole, at = b"", 0
        while True:
            end = body.index(b"\r\n", at)
            size = int(body[at:end].split(b";")[0], 16)
            if size == 0:
                return whole
            whole += body[end + 2 : end + 2 + size]
            at = end + 2 + size + 2

    def _control(self, path: str, body: bytes) -> None:
        server = self.server
        with server.lock:
            if path == "/-/faults":
                defaults = {"match": "", "skip": 0, "count": 1, "probability": 1.0}
                defaults |= {"seconds": 0.5}
                server.rules = [{**defaults, **rule} for rule in json.loads(body)]
                server.requests.clear()
                server.faults.clear()
                server.bytes_sent = 0
            facts = {
                "requests": list(server.requests),
                "faults": dict(server.faults),
                "bytes_sent": server.bytes_sent,
            }
        self._send(200, {}, json.dumps(facts).encode())

    def _kill_client(self) -> None:
        """Kill the process at the other end of this connection."""
        for found in psutil.net_connections("tcp"):
            if found.laddr == self.client_address and found.pid:
                os.kill(found.pid, signal.SIGKILL)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _failure(self, status: int, code: str) -> tuple[int, dict[str, str], bytes]:
        message = f"{XML}<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        return status, {"Content-Type": "application/xml"}, message.encode()

    def _error(self, status: int, code: str) -> None:
        self._send(*self._failure(status, code))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.bytes_sent += len(body)


def _quoted(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def _entry(root: Path, name: str, shared: bool) -> str:
    if shared:
        return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
    stat = (root / name).stat()
    modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
    tag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    return (
        f"<Contents><Key>{escape(name)}</Key><LastModified>{modified}</LastModified>"
        f"<ETag>{escape(tag)}</ETag><Size>{stat.st_size}</Size></Contents>"
    )


class S3:
    """A running server, as tests use it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.options = {
            "aws_endpoint": url,
            "aws_allow_http": "true",
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": "test-secret",
            "aws_region": "us-east-1",
        }

    @property
    def arguments(self) -> list[str]:
        """Return the options as `kalm` takes them."""
        return [a for k, v in self.options.items() for a in ("--storage-option", f"{k}={v}")]

    def faults(self, *rules: dict[str, Any]) -> None:
        """Replace the fault rules, and forget the counts."""
        data = json.dumps(rules).encode()
        request = urllib.request.Request(f"{self.url}/-/faults", data=data, method="POST")
        urllib.request.urlopen(request).close()

    def stats(self) -> dict[str, Any]:
        """Return requests and faults since the rules were set."""
        with urllib.request.urlopen(f"{self.url}/-/stats") as reply:
            stats: dict[str, Any] = json.load(reply)
        return stats


@contextlib.contextmanager
def serve(folder: Path, *, conditional: bool = True) -> Iterator[S3]:
    """Run a server with one bucket, `bucket`."""
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.support.s3_server", str(folder)]
    process = subprocess.Popen(
        command + ([] if conditional else ["--no-conditional"]), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield S3(f"http://127.0.0.1:{int(process.stdout.readline())}", folder)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--no-conditional", action="store_true")
    given = parser.parse_args()
    server = Server(given.folder, given.port, not given.no_conditional)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
