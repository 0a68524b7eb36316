"""A Hugging Face Hub with one dataset, `owner/name`, whose files lie in a folder.

It keeps the files of the last commit alone, and gives them for every commit that is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from urllib.parse import unquote

from tests.support.file_server import Ranges

DATASET = "hf://datasets/owner/name"
AT = r"(?:main|[0-9a-f]{40})"
"""Every revision is there."""


class Hub(Ranges):
    """Answers what `HfFileSystem`, `snapshot_download` and `create_commit` ask."""

    commit = "0" * 40
    """The commit at which `main` is. A test that moves it has a class of its own."""

    def do_GET(self) -> None:
        """Answer a question about the dataset, or send a file."""
        path, _, query = unquote(self.path).partition("?")
        if re.fullmatch(rf"/api/datasets/owner/name(/revision/{AT})?", path):
            revision = path.rpartition("/revision/")[2]
            sha = revision if len(revision) == 40 else self.commit
            return self._json({"id": "owner/name", "sha": sha, "siblings": self._files()})
        if tree := re.fullmatch(rf"/api/datasets/owner/name/tree/{AT}/?(.*)", path):
            return self._tree(Path(self.directory), tree[1], "recursive=true" in query.lower())
        self.path = self._inside(path)
        return super().do_GET()

    def do_HEAD(self) -> None:
        """Say of a file what its download needs to know."""
        file = Path(self.directory, self._inside(unquote(self.path.partition("?")[0])).lstrip("/"))
        if not file.is_file():
            return self.send_error(404)
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"')
        self.send_header("Content-Length", str(file.stat().st_size))
        self.end_headers()
        return None

    def do_POST(self) -> None:
        """Make the dataset, say how files are to be sent, and take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            return self._json({"url": self._url()})
        if self.path.endswith("/validate-yaml"):
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        for line in body.splitlines():
            change = json.loads(line)
            file = Path(self.directory, change["value"].get("path", ""))
            if change["key"] == "file":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(change["value"]["content"]))
            elif change["key"] == "deletedFile":
                file.unlink()
        type(self).commit = hashlib.sha1(body).hexdigest()
        return self._json(
            {"commitUrl": f"{self._url()}/commit/{self.commit}", "commitOid": self.commit}
        )

    def _url(self) -> str:
        return f"http://{self.headers['Host']}/datasets/owner/name"

    def _inside(self, path: str) -> str:
        return re.sub(rf"/datasets/owner/name/resolve/{AT}", "", path, count=1)

    def _files(self) -> list[dict[str, str]]:
        root = Path(self.directory)
        found = sorted(file for file in root.rglob("*") if file.is_file())
        return [{"rfilename": str(file.relative_to(root))} for file in found]

    def _tree(self, root: Path, folder: str, recursive: bool) -> None:
        if not (root / folder).is_dir():
            return self.send_error(404)
        entries = (root / folder).rglob("*") if recursive else (root / folder).iterdir()
        return self._json(
            [
                {
                    "type": "directory" if entry.is_dir() else "file",
                    "path": str(entry.relative_to(root)),
                    "size": entry.stat().st_size,
                    "oid": f"{entry.stat().st_mtime_ns:x}",
                }
                for entry in sorted(entries)
            ]
        )

    def _json(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
