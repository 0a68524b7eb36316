"""Says in one value where a Lance dataset lies and what its store needs.

It opens the dataset and the small files beside it. It does not know what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import lance
from lance.file import LanceFileSession

from kalm_encoder.errors import TableError, first_line


@dataclass(frozen=True)
class Location:
    """The address of a dataset or a file, and how to reach it.

    Attributes:
        uri: Local path or object store URL.
        options: Storage options as Lance names them, such as aws_endpoint. They may hold
            credentials, so no text form of a location shows them.
    """

    uri: str
    options: dict[str, str] | None = field(default=None, repr=False, hash=False)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, path: str) -> Location:
        """Return the location of something below this one, in the same store."""
        return Location(f"{self.uri.rstrip('/')}/{path}", self.options)

    def dataset(self, *, metadata_cache_bytes: int | None = None) -> lance.LanceDataset:
        """Open the latest version of the Lance dataset that lies here.

        Args:
            metadata_cache_bytes: Most bytes of metadata that Lance keeps in memory for this
                dataset. None leaves the limit to Lance, which is right for a reader.

        Raises:
            TableError: There is no dataset here, or the store refused.
        """
        try:
            return lance.dataset(
                self.uri,
                storage_options=self.options,
                metadata_cache_size_bytes=metadata_cache_bytes,
            )
        except (ValueError, OSError) as error:
            raise TableError(f"no passage table at {self.uri}: {first_line(error)}") from error

    def file_session(self) -> LanceFileSession:
        """Open the folder of this location for reading and writing whole files."""
        return LanceFileSession(self.uri, storage_options=self.options)
