"""Names what is no JSONL, CSV or TSV at all by how it begins, and what makes it one.

Without this each of its lines would be a reject, and none would say what is wrong.
"""

from __future__ import annotations

from kalm_encoder.errors import InputError
from pipeline.corpus.cells import BOM

HEAD_BYTES = 1 << 16
"""Number of bytes at the start of a file by which it is judged."""
SIGNATURES = (
    (b"\x1f\x8b", "compressed twice", "decompress it once: gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed twice", "decompress it once: unzstd"),
    *(
        (b"bzh%d1ay&sy" % i, "compressed with bzip2", "decompress it: bunzip2")
        for i in range(1, 10)
    ),
    (b"\xfd7zxz\0", "compressed with xz", "decompress it: unxz"),
    (b"pk\3\4", "a ZIP archive", "name the file in it, such as zip://corpus.jsonl::PATH"),
    (b"par1\x15", "a Parquet file", "give it a name that ends in .parquet"),
    (b"arrow1\0", "an Arrow or Feather file", "write it as Parquet"),
    (b"%pdf", "a PDF", "extract its text first"),
    (b"sqlite format 3\0", "an SQLite database", "export the table as CSV"),
    (b"\xff\xfe", "UTF-16 or UTF-32", "convert it: iconv -f UTF-16 -t UTF-8 (or UTF-32)"),
    (b"\xfe\xff", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull`"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (b"<?xml", "XML", "convert it to JSONL, or download the file again if it is an error"),
)
"""How a file begins, in lower case; what it is; what to do."""


def refuse_foreign(path: str, head: bytes, *, is_json: bool) -> None:
    """Refuse a file that is something else than its name says.

    Args:
        path: Path of the file.
        head: Its first HEAD_BYTES, decompressed, or all of it.
        is_json: Whether it should be JSONL.

    Raises:
        InputError: If it is something else; the message says what it is and what to do.
    """
    refuse_signature(path, head)
    start = head.removeprefix(BOM).lstrip()
    found = _no_lines(head) or (_other_json(start) if is_json else None)
    if found:
        what, remedy = found
        raise InputError(f"{path} is {what}: {remedy}")


def refuse_signature(path: str, head: bytes) -> None:
    """Refuse a file that begins as files of another kind do.

    Raises:
        InputError: If it does; the message says what it is and what to do.
    """
    begins = head.removeprefix(BOM).lstrip()[:32].lower()
    for signature, what, remedy in SIGNATURES:
        if begins.startswith(signature):
            raise InputError(f"{path} is {what}: {remedy}")


def _no_lines(head: bytes) -> tuple[str, str] | None:
    if b"/annex/objects/" in head[:300] and head.count(b"\n") < 2:
        return "a pointer of git-annex", "run `git annex get`"
    if head.count(b"\0") > len(head) // 5:
        return "binary, or UTF-16", "convert it: iconv -f UTF-16LE -t UTF-8 (or UTF-16BE)"
    if b"\r" in head.rstrip() and b"\n" not in head:
        return "a text whose lines end in carriage returns alone", "convert it: tr '\\r' '\\n'"
    return None


def _other_json(start: bytes) -> tuple[str, str] | None:
    first = start.partition(b"\n")[0].rstrip()
    objects = start[1:].lstrip().startswith((b"{", b"["))
    if start.startswith(b"[") and (objects or not first.endswith(b"]")):
        return "one JSON array", "write one object per line: jq -c '.[]' FILE > FILE.jsonl"
    if first == b"{":
        return "JSON over several lines", "write one object per line: jq -c . FILE > FILE.jsonl"
    return None
