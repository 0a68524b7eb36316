"""Plans a large corpus on the workers, with the plan that one process makes.

A worker scans a group of files, or a block of a file so large that one worker would read it alone
for long; text_blocks.py says how. Nothing is recorded: a command that is killed plans again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.corpus.access import BEGIN_BYTES, compression_of, open_binary, open_store, readable
from pipeline.corpus.cells import Cells
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import FieldOptions, Fields
from pipeline.corpus.scans import Scan, scan_in_threads
from pipeline.corpus.text_blocks import Count, bounds_of, cuts, joined
from pipeline.corpus.text_detect import detect
from pipeline.messages import Executor, Part
from pipeline.run.plan_work import Block, BlockShards, FileGroup, PlanWork
from pipeline.table.steps import Steps
from pipeline.workers.local import in_process

SMALL_CORPUS_BYTES = 64 << 20
"""A corpus with less text is planned in a fraction of the time in which workers start."""
GROUP_BYTES = 64 << 20
"""Text that a worker scans at once if files are small, so that handing it out costs little."""
OPEN_BYTES = 1 << 20
"""Opening a file counts as much as scanning so many bytes; of a columnar one nothing is scanned."""
LARGE_FILE_BYTES = 1 << 30
LARGE_SHARE = 1 / 16
"""A file is cut into blocks if it is larger than both. Blocks are read twice: they pay off where
there are fewer files than workers, and where a worker would have one file for long."""
BLOCK_BYTES = 128 << 20


@dataclass(frozen=True)
class LargeFile:
    """A file that is cut into blocks.

    Attributes:
        file: The file.
        fields: Where the passages are in it.
        cells: How its lines become cells; None for JSONL.
        header: Number of bytes of its header.
        first_line: Number of the first line behind the header.
        blocks: First and last bytes of its blocks, see `bounds_of`.
    """

    file: InputFile
    fields: Fields
    cells: Cells | None
    header: int
    first_line: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ScanOnWorkers:
    """Scans files on workers if they are large enough, else in this process.

    Attributes:
        table: The table that is planned for; its storage options are those of the files too.
        execute: Does the work.
    """

    table: Location
    execute: Executor

    def __call__(
        self,
        files: Sequence[InputFile],
        shard_size: int,
        options: FieldOptions,
        storage_options: dict[str, str] | None,
    ) -> list[Scan]:
        """Return the fields and row ranges of each file.

        Raises:
            InputError: If a file cannot be read, or not be cut into rows.
            IncompleteError: If workers failed for good.
        """
        if self.execute is not in_process:  # where a scan has more threads than a work would have
            sizes = _sizes(files, storage_options)
        if self.execute is in_process or sum(sizes) < SMALL_CORPUS_BYTES:
            return scan_in_threads(files, shard_size, options, storage_options)
        large = _large_files(files, sizes, options, storage_options)
        work = PlanWork(table=self.table, shard_size=shard_size, options=options)
        whats = list(_first_parts(files, sizes, large))
        results = self._results("planning", work, whats)
        counts: dict[InputFile, list[Count]] = {file: [] for file in large}
        scans: dict[InputFile, Scan] = {}
        for (what, _), result in zip(whats, results, strict=True):
            if isinstance(what, FileGroup):
                scans |= zip(what.files, result, strict=True)
            else:
                counts[what.file].append(result)
        if large:
            scans |= self._cut(work, large, counts)
        return [scans[file] for file in files]

    def _cut(
        self,
        work: PlanWork,
        large: dict[InputFile, LargeFile],
        counts: dict[InputFile, list[Count]],
    ) -> dict[InputFile, Scan]:
        """Cut the blocks of large files, whose lines were counted."""
        whats = [
            (BlockShards(file, known.cells, cut), BLOCK_BYTES)
            for file, known in large.items()
            for cut in cuts(counts[file], known.header, known.first_line, work.shard_size)
        ]
        parts: dict[InputFile, list[list[RowRange]]] = {file: [] for file in large}
        for (what, _), result in zip(
            whats, self._results("cutting large files into shards", work, whats), strict=True
        ):
            parts[what.file].append(result)
        return {
            file: (known.fields, joined(file.path, parts[file], counts[file]))
            for file, known in large.items()
        }

    def _results(self, name: str, work: PlanWork, whats: Sequence[tuple[Any, int]]) -> list[Any]:
        """Do parts and return their results in order.

        Raises:
            InputError: The first in the order of the parts, as if they were done one by one.
        """
        parts = [Part(number, what, size) for number, (what, size) in enumerate(whats)]
        found: dict[int, Any] = {}
        bad = len(parts)
        with closing(Steps(self.execute).do(name, work, parts)) as results:
            for part, result in results:
                found[part.number] = result
                if isinstance(result, InputError):
                    bad = min(bad, part.number)
                if bad < len(parts) and all(number in found for number in range(bad)):
                    raise found[bad]
        return [found[part.number] for part in parts]


def _sizes(files: Sequence[InputFile], storage_options: dict[str, str] | None) -> list[int]:
    """Return the bytes of text of each file: 0 if it has none, or if its size is not known."""

    def size(file: InputFile) -> int:
        if file.is_columnar:
            return 0
        try:
            with readable(file.path):
                fs, path = open_store(file.path, storage_options)
                return int(fs.info(path).get("size") or 0)
        except InputError:
            return 0  # scanning it will say what is wrong with it

    with ThreadPoolExecutor(thread_name_prefix="size") as pool:
        return list(pool.map(size, files))


def _large_files(
    files: Sequence[InputFile],
    sizes: Sequence[int],
    options: FieldOptions,
    storage_options: dict[str, str] | None,
) -> dict[InputFile, LargeFile]:
    """Return what is known of the files that are to be cut into blocks, in order."""
    least = max(LARGE_FILE_BYTES, sum(sizes) * LARGE_SHARE)
    found = {}
    for file, size in zip(files, sizes, strict=True):
        if size > least and not file.is_packed:
            try:
                fields, cells, header = detect(file, options, storage_options)
                with (
                    readable(file.path),
                    open_binary(file.path, storage_options, BEGIN_BYTES) as raw,
                ):
                    is_compressed = compression_of(raw, file.path) is not None
            except InputError:
                continue  # scanning it will say what is wrong with it, in the order of the files
            if not (is_compressed or (cells and cells.spans_lines)):
                blocks = tuple(bounds_of(len(header), size, BLOCK_BYTES))
                first_line = 1 + header.count(b"\n")
                found[file] = LargeFile(file, fields, cells, len(header), first_line, blocks)
    return found


def _first_parts(
    files: Iterable[InputFile], sizes: Sequence[int], large: dict[InputFile, LargeFile]
) -> Iterator[tuple[FileGroup | Block, int]]:
    """Yield file groups and blocks in the order of the files, each with its bytes."""
    group: list[InputFile] = []
    num_bytes = 0
    for file, size in zip(files, sizes, strict=True):
        known = large.get(file)
        if not known:
            group.append(file)
            num_bytes += OPEN_BYTES + size
        if group and (known or num_bytes >= GROUP_BYTES):
            yield FileGroup(tuple(group)), num_bytes
            group, num_bytes = [], 0
        if known:
            for start, end in known.blocks:
                yield Block(file, known.cells, start, end), end - start
    if group:
        yield FileGroup(tuple(group)), num_bytes
