"""How a file is reached: the options of its store, its bytes, and what its errors mean.

A path may be local or any fsspec URL, chains such as `zip://corpus.jsonl::corpus.zip` among them.
Knows no format: it hands out bytes.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zipfile import BadZipFile

import fsspec

from kalm_encoder.errors import InputError, KalmError, first_line
from pipeline.corpus.clouds import fsspec_options
from pipeline.corpus.foreign import refuse_signature

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COPIES = ("simplecache", "filecache")
"""A chain that begins with one of these copies the whole file to this machine before it is read."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": "zstd" for i in range(16)},  # a frame to be skipped
}
BEGIN_BYTES = 32
"""Bytes of a file that are looked at to find out how it is compressed."""
REMEDIES = {
    "NoCredentialsError": "give --storage-option aws_access_key_id=… and aws_secret_access_key=…, "
    "or aws_skip_signature=true if the bucket is public",
}
"""What can be done about errors of libraries that may not be installed, by the error's class."""
DAMAGED = (EOFError, zlib.error, zstd.ZstdError, BadZipFile)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn what a store, a decompressor or a library raises into an InputError about the file.

    Any library may be behind a URL, with errors of its own, so all classes count that are not
    Python's own. Of those only the ones count that a file can cause: others are our mistakes.
    """
    try:
        yield
    except KalmError:
        raise
    except Exception as error:
        is_ours = not isinstance(error, (OSError, EOFError, ValueError, ImportError))
        if is_ours and type(error).__module__ == "builtins":
            raise
        raise InputError(f"cannot read {path}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return what went wrong with a file, in one line, with a remedy where one is known."""
    if isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__  # it says why a server could not be asked
    remedy = REMEDIES.get(type(error).__name__)
    if isinstance(error, DAMAGED) or type(error).__name__ == "BadGzipFile":
        remedy = "it is damaged or incomplete: copy it again"
    # The first line of an error of the Hub has only its status.
    what = " ".join(str(error).split()) if hasattr(error, "response") else first_line(error)
    return what + (f". Remedy: {remedy}" if remedy else "")


def absolute(path: str) -> str:
    """Return an address in which a local path is absolute; URLs stay as they are."""
    *chain, last = path.split("::")
    if "://" not in last:
        last = os.path.abspath(os.path.expanduser(last))
    return "::".join([*chain, last])


def split_chain(url: str) -> tuple[str, str, str]:
    """Return the copying caches before the part of a URL that names the file, it, and the rest.

    `simplecache::zip://c.jsonl::https://x/c.zip` gives `simplecache::`, `zip://c.jsonl` and
    `::https://x/c.zip`.
    """
    parts = url.split("::")
    first = 0
    while parts[first] in COPIES and first < len(parts) - 1:
        first += 1
    before, after = parts[:first], parts[first + 1 :]
    return "".join(f"{p}::" for p in before), parts[first], "".join(f"::{p}" for p in after)


def open_store(url: str, storage_options: dict[str, str] | None) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path of the URL in it."""
    fs, path = fsspec.core.url_to_fs(url, **fsspec_options(url, storage_options))
    return fs, path


def open_binary(
    path: str, storage_options: dict[str, str] | None, block_size: int | None = None
) -> Any:
    """Open a file as a stream of the bytes that are stored.

    Args:
        path: Path or URL of the file.
        storage_options: Options of its store.
        block_size: Bytes that a store is asked for at once. None leaves it to its file system.
    """
    fs, inner = open_store(path, storage_options)
    stream = fs.open(inner, "rb", block_size=block_size)
    stream.store = fs  # an archive that is forgotten closes the files in it
    return stream


def open_text(path: str, storage_options: dict[str, str] | None) -> Any:
    """Open a text file as a stream of decompressed bytes.

    Raises:
        InputError: If it is not compressed although its name says so.
    """
    raw = open_binary(path, storage_options)
    return decompressed(raw, compression_of(raw, path))


def compression_of(raw: Any, path: str) -> str | None:
    """Return how a text file is compressed, which its first bytes say; None if it is not.

    Args:
        raw: The stored bytes, open at their start.
        path: Its path, for the error.

    Raises:
        InputError: If it is not compressed although its name says so.
    """
    begins = raw.read(BEGIN_BYTES)
    raw.seek(0)
    for magic, compression in MAGIC.items():
        if begins.startswith(magic):
            return compression
    for suffix, compression in COMPRESSIONS.items():
        if begins and split_chain(path)[1].endswith(suffix):
            refuse_signature(path, begins)
            raise InputError(
                f"cannot read {path}: it is not compressed with {compression}, since it begins "
                f"with {begins[:8]!r}. Give it a name without {suffix} if it is text, or copy it "
                "again"
            )
    return None


def decompressed(raw: Any, compression: str | None) -> Any:
    """Return a stream of the bytes that another one holds in compressed form."""
    if compression == "zstd":
        # `zstd --long=31` writes frames that need 2 GiB to be read, 16 times the default limit.
        options = {int(zstd.DecompressionParameter.window_log_max): 31}
        return zstd.ZstdFile(raw, options=options)
    return fsspec.compression.compr[compression](raw, mode="rb")


def check_ranges(url: str, storage_options: dict[str, str] | None) -> None:
    """Refuse an HTTP server that sends whole files only: shards are read from their middle.

    Raises:
        InputError: If the server of a URL does so; the message has the URL that works.
    """
    parts = url.split("::")
    for i, part in enumerate(parts):
        if not part.startswith(("http://", "https://")) or (i and parts[i - 1] in COPIES):
            continue
        with readable(url):
            fs, path = open_store(part, storage_options)
            info = fs.info(path)
            with fs.open(path, "rb", cache_type="none") as stream:
                try:
                    stream.seek((info["size"] or 2) - 1)
                    stream.read(1)
                except ValueError as error:
                    copied = "::".join([*parts[:i], COPIES[0], *parts[i:]])
                    raise InputError(
                        f"the server of {part} sends whole files only, and shards begin in the "
                        f"middle of a file: give {copied}, which copies the file to each machine "
                        "before it is read"
                    ) from error
