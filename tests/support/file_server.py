"""An HTTP server for the files of a folder, which sends them whole or in ranges."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WholeFiles(SimpleHTTPRequestHandler):
    """Python's own server: it ignores the header Range."""

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class Ranges(WholeFiles):
    """The same with ranges."""

    def do_GET(self) -> None:
        """Send a file, or the part of it that is asked for."""
        file = Path(self.translate_path(self.path.partition("?")[0]))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or not file.is_file():
            return super().do_GET()
        raw = file.read_bytes()
        part = raw[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(raw)}")
        self.end_headers()
        self.wfile.write(part)
        return None


@contextmanager
def serve_files(folder: Path, answers: type[WholeFiles]) -> Iterator[str]:
    """Serve a folder; yields the URL of its root."""
    handler = partial(answers, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
