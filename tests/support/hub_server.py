"""A Hugging Face Hub with one dataset, `owner/name`, whose files lie in a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

from tests.support.file_server import Ranges

DATASET = "hf://datasets/owner/name"


class Hub(Ranges):
    """Answers what `HfFileSystem` asks: the dataset, its folders and its files."""

    def do_GET(self) -> None:
        """Answer a question about the dataset, or send a file."""
        path = unquote(self.path.partition("?")[0])
        if re.fullmatch(r"/api/datasets/owner/name(/revision/main)?", path):
            return self._json({"id": "owner/name", "sha": "0" * 40, "siblings": []})
        if tree := re.fullmatch(r"/api/datasets/owner/name/tree/main/?(.*)", path):
            return self._tree(Path(self.directory), tree[1])
        self.path = path.replace("/datasets/owner/name/resolve/main", "", 1)
        return super().do_GET()

    def _tree(self, root: Path, folder: str) -> None:
        if not (root / folder).is_dir():
            return self.send_error(404)
        return self._json(
            [
                {
                    "type": "directory" if entry.is_dir() else "file",
                    "path": str(entry.relative_to(root)),
                    "size": entry.stat().st_size,
                    "oid": f"{entry.stat().st_mtime_ns:x}",
                }
                for entry in sorted((root / folder).iterdir())
            ]
        )

    def _json(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
