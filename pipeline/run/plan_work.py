"""What a worker does of a plan: it scans a group of files, or a block of a large one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kalm_encoder.errors import InputError
from pipeline.corpus.access import open_binary, readable
from pipeline.corpus.cells import Cells
from pipeline.corpus.inputs import InputFile
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.scans import Scan, open_file
from pipeline.corpus.text_blocks import Cut, count, cut_shards
from pipeline.messages import Place
from pipeline.table.steps import DoPart, StepWork

BLOCK_READ_BYTES = 4 << 20
"""Bytes of a block that are read at once. The store is asked for as many more, and not for what its
file system would read ahead in a whole file: behind the end of a block that is in vain."""


@dataclass(frozen=True)
class FileGroup:
    """Files that one worker scans, each from its start to its end."""

    files: tuple[InputFile, ...]


@dataclass(frozen=True)
class Block:
    """A block of a large file whose lines are counted.

    Attributes:
        file: The file.
        cells: How its lines become cells; None for JSONL.
        start: First byte of the block.
        end: The byte behind the last one.
    """

    file: InputFile
    cells: Cells | None
    start: int
    end: int


@dataclass(frozen=True)
class BlockShards:
    """The shards of a large file that begin in one block."""

    file: InputFile
    cells: Cells | None
    cut: Cut


@dataclass(frozen=True, kw_only=True)
class PlanWork(StepWork):
    """The work of planning. An InputError is a result, since a second attempt would not help.

    Attributes:
        shard_size: Rows per shard.
        options: Fields that the user named.
    """

    shard_size: int
    options: FieldOptions

    def load(self, place: Place) -> DoPart:
        """Return the function that scans, counts or cuts."""
        return self._plan

    def _plan(self, what: FileGroup | Block | BlockShards) -> Any:
        try:
            if isinstance(what, FileGroup):
                return [self._scan(file) for file in what.files]
            path = what.file.path
            with (
                readable(path),
                open_binary(path, self.table.options, BLOCK_READ_BYTES) as stream,
            ):
                if isinstance(what, Block):
                    return count(stream, what.start, what.end, what.cells, BLOCK_READ_BYTES)
                return cut_shards(
                    stream, what.cut, what.cells, path, self.shard_size, BLOCK_READ_BYTES
                )
        except InputError as error:
            return error

    def _scan(self, file: InputFile) -> Scan:
        return open_file(file, self.table.options).scan(self.shard_size, None, self.options)
