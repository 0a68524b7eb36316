"""Says in one value where a Lance dataset lies and what its store needs.

It opens the dataset and the small files beside it. It does not know what is in them.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import lance
from lance.dataset import Tags
from lance.file import LanceFileSession

from kalm_encoder.errors import InputError, TableError, first_line
from kalm_encoder.process import check_process

LOCAL_SCHEMES = ("file", "file-object-store")


def address(given: str | os.PathLike[str]) -> str:
    """Return an address in the one form in which everything here takes it.

    A local path becomes absolute, and a `~` at its start becomes the home folder. A URL stays as it
    is, and as Lance reads it: %41 in it stands for A. Only `#` and `?`, at which Lance would cut
    it, are escaped.

    Raises:
        InputError: If Lance cannot open such an address.
    """
    text = os.fspath(given)
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise InputError(
            f"the address {text!r} holds a control character or bytes that are not UTF-8, which "
            "Lance cannot open: rename the folder"
        )
    scheme, is_url, rest = text.partition("://")
    if is_url and scheme in LOCAL_SCHEMES:
        text = unquote(rest.removeprefix("localhost"))
        if not text.startswith("/"):
            raise InputError(f"{given} names no absolute path: write {scheme}:///… or a plain path")
    elif is_url:
        # After a `+` Lance's own `s3+ddb://` has a query.
        escaped = rest.replace("#", "%23")
        return f"{scheme}://{escaped if '+' in scheme else escaped.replace('?', '%3F')}"
    return os.path.abspath(os.path.expanduser(text))


@dataclass(frozen=True)
class Location:
    """The address of a dataset or a file, and how to reach it.

    Attributes:
        uri: Local path or object store URL, as `address` returns it.
        options: Storage options as Lance names them, such as aws_endpoint. They may hold
            credentials, so no text form of a location shows them.
    """

    uri: str
    options: dict[str, str] | None = field(default=None, repr=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", address(self.uri))

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        """Whether this is a path on a disk of this machine."""
        return "://" not in self.uri

    def __truediv__(self, path: str) -> Location:
        """Return the location of something below this one, in the same store."""
        return Location(f"{self.uri.rstrip('/')}/{path}", self.options)

    def dataset(
        self, *, metadata_cache_bytes: int | None = None, index_cache_bytes: int | None = None
    ) -> lance.LanceDataset:
        """Open the latest version of the Lance dataset that lies here.

        Args:
            metadata_cache_bytes: Most bytes of metadata that Lance keeps in memory for this
                dataset. None leaves the limit to Lance, which is right for a reader.
            index_cache_bytes: The same for pages of indexes.

        Raises:
            TableError: There is no dataset here, or the store refused.
        """
        return self._open(self.uri, metadata_cache_bytes, index_cache_bytes)

    def tags(self) -> Tags:
        """Return the tags of the dataset, to change them.

        Where a local path holds an umlaut or a character that a URL escapes, Lance makes the folder
        of a new tag under the escaped path: an empty twin of the table, or an error where the
        parent folder is read-only. Under the scheme used here it makes none.

        Raises:
            TableError: There is no dataset here, or the store refused.
        """
        uri = f"file-object-store://{quote(self.uri)}" if self.is_local else self.uri
        return self._open(uri).tags

    def file_session(self) -> LanceFileSession:
        """Open the folder of this location for reading and writing whole files."""
        return LanceFileSession(self.uri, storage_options=self.options)

    def _open(
        self,
        uri: str,
        metadata_cache_bytes: int | None = None,
        index_cache_bytes: int | None = None,
    ) -> lance.LanceDataset:
        check_process()
        try:
            return lance.dataset(
                uri,
                storage_options=self.options,
                metadata_cache_size_bytes=metadata_cache_bytes,
                index_cache_size_bytes=index_cache_bytes,
            )
        except (ValueError, OSError) as error:
            raise TableError(f"no passage table at {self.uri}: {first_line(error)}") from error


def read_text(session: LanceFileSession, path: str) -> str:
    """Return the text of a file; `path` is below the session's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text")
        session.download_file(path, str(file))
        return file.read_text(encoding="utf-8")
