"""A look at a corpus in bounded time: blocks of it, at random, tokenised.

A block is a run of records: those that begin in so many bytes of a plain text file, or so many rows
of a Parquet file or Lance table. Every record is in one block and blocks are drawn at random
without replacement, so long records are drawn no more often than short ones. Compressed files, and
CSV whose quotes may hide line breaks, can only be read from their start: their blocks are the first
ones, and a note says so. A corpus that is read to its end within the time is known exactly.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from kalm_encoder.errors import InputError
from kalm_encoder.model.encoder import passage_ids
from pipeline.corpus import text as text_files
from pipeline.corpus.columnar import LanceTable, ParquetFile
from pipeline.corpus.inputs import COMPRESSIONS, file_format
from pipeline.corpus.passages import FieldOptions, to_rows
from pipeline.estimate.blocks import WARM_UP, OrderedFile, Piece, count_lines, read_piece, text_size
from pipeline.estimate.sample import COLUMNS, ORDERED, TEXT, Block, Sample, Stratum

LEAST_BLOCKS, MOST_BLOCKS = 30, 20_000
"""Of a kind of files: below, an interval means nothing, so that many are read whatever the time."""
LEAST_BYTES = 1 << 20
"""Decompressed, of compressed files together."""
BLOCK_BYTES, BLOCK_ROWS = (1 << 12, 1 << 16), (16, 256)
"""The smallest and the largest block."""
MOST_EXAMPLES, BLOCK_EXAMPLES = 4000, 100


def sample_corpus(
    files: Sequence[str],
    tokenizer: Any,
    *,
    fields: FieldOptions,
    seconds: float,
    seed: int,
    storage_options: dict[str, str] | None = None,
) -> Sample:
    """Read and tokenise blocks of a corpus until the time is up.

    Args:
        files: from `expand_inputs`.
        tokenizer: the model's.
        fields: fields the user named.
        seconds: to spend, a fifth of it on counting lines; LEAST_BLOCKS are read in any case.
        seed: of the draw.
        storage_options: for object stores.

    Raises:
        InputError: a file cannot be read, or has no id or text field; no passage was found.
    """
    return _Sampler(files, tokenizer, fields, seconds, seed, storage_options).run()


class _Sampler:
    """One draw: the clock, the random numbers and what was found so far."""

    def __init__(
        self,
        files: Sequence[str],
        tokenizer: Any,
        fields: FieldOptions,
        seconds: float,
        seed: int,
        storage_options: dict[str, str] | None,
    ) -> None:
        self._files, self._tokenizer, self._fields = files, tokenizer, fields
        self._options = storage_options
        self._random = random.Random(seed)
        self._began = time.monotonic()
        self._counted_by = self._began + seconds
        self._end = self._began + 0.8 * seconds
        self._sample = Sample(len(files))

    def run(self) -> Sample:
        """Sample each kind of files for an equal part of the time that is left."""
        ordered, plain = self._texts()
        kinds = [(ORDERED, ordered), (TEXT, plain), (COLUMNS, self._columns())]
        present = [(kind, pieces) for kind, pieces in kinds if pieces]
        for i, (kind, pieces) in enumerate(present):
            now = time.monotonic()
            deadline = now + max(0.0, self._end - now) / (len(present) - i)
            stratum = Stratum(kind, sum(p.length for p in pieces))
            most = MOST_EXAMPLES // len(present)
            if kind == ORDERED:
                self._read_in_order(stratum, pieces, deadline, most)
            else:
                self._read_at_random(stratum, pieces, deadline, most)
            self._sample.strata.append(stratum)
        if not any(len(block.lengths) for block in self._sample.blocks):
            raise InputError(f"no passage found in {', '.join(self._files[:3])}")
        self._sample.seconds = time.monotonic() - self._began
        return self._sample

    def _texts(self) -> tuple[list[Piece], list[Piece]]:
        """Return the text files that can only be read in order, and those that can be entered."""
        ordered, plain = [], []
        for number, path in enumerate(self._files):
            if file_format(path) in ("parquet", "lance"):
                continue
            fields, columns, header = text_files.detect(path, self._fields, self._options)
            size = text_size(path, self._options)
            piece = Piece(number, path, fields, 0, size, 0, columns=columns)
            if path.endswith(COMPRESSIONS) or not text_files.is_plain(columns):
                ordered.append(replace(piece, start=header.num_lines if header else 0))
            elif size:
                plain.append(piece)
        return _cut(ordered, 64, BLOCK_BYTES), _cut(plain, 256, BLOCK_BYTES)

    def _columns(self) -> list[Piece]:
        pieces = []
        for number, path in enumerate(self._files):
            if file_format(path) not in ("parquet", "lance"):
                continue
            reader = LanceTable if file_format(path) == "lance" else ParquetFile
            file = reader(path, self._options)
            fields = file.choose_fields(self._fields)
            pieces += [
                Piece(number, path, fields, start, rows, 0, (), file.content, file.version)
                for start, rows in file.groups()
                if rows
            ]
        return _cut(pieces, 256, BLOCK_ROWS)

    def _read_at_random(
        self, stratum: Stratum, pieces: list[Piece], deadline: float, most: int
    ) -> None:
        ends = list(accumulate(piece.num_blocks for piece in pieces))
        drawn = self._random.sample(range(ends[-1]), min(ends[-1], MOST_BLOCKS))
        for number in drawn:
            if time.monotonic() > deadline and len(stratum.blocks) >= LEAST_BLOCKS:
                break
            i = bisect_right(ends, number)
            k = number - (ends[i - 1] if i else 0)
            size, lines, records = read_piece(pieces[i], k, self._options)
            start = pieces[i].start + k * pieces[i].block
            self._add(stratum, pieces[i], start, size, lines, records, most)
        stratum.complete = len(stratum.blocks) == ends[-1]
        if stratum.kind == COLUMNS:
            stratum.lines = int(stratum.size)
        elif not stratum.complete:
            stratum.lines = count_lines(pieces, self._counted_by)

    def _read_in_order(
        self, stratum: Stratum, pieces: list[Piece], deadline: float, most: int
    ) -> None:
        self._random.shuffle(pieces)
        finished = read = 0
        for i, piece in enumerate(pieces):
            now = time.monotonic()
            until = now + max(0.0, deadline - now) / (len(pieces) - i)
            if now > deadline and read >= LEAST_BYTES:
                break
            first = len(stratum.blocks)
            file = OrderedFile(piece, self._options)
            seen = 0
            for start, taken, size, lines, records in file.blocks():
                self._add(stratum, piece, start, taken, lines, records, most)
                seen += size
                if time.monotonic() > until and seen >= max(2 * WARM_UP, LEAST_BYTES / len(pieces)):
                    break
            read += seen
            finished += file.finished
            new = stratum.blocks[first:]
            if file.finished:
                scale = piece.length / (sum(b.size for b in new) or 1)
                new = [replace(b, size=b.size * scale) for b in new]
            else:
                new = new[file.warm_from :]
            stratum.blocks[first:] = new
        stratum.complete = finished == len(pieces)
        if not stratum.complete:
            self._sample.notes.append(
                f"{len(pieces)} compressed or quoted files can only be read from their start, and "
                f"{finished} were read to the end: their intervals hold if the rest is alike"
            )

    def _add(
        self,
        stratum: Stratum,
        piece: Piece,
        start: int,
        size: float,
        lines: int,
        records: list[tuple[int, dict[str, Any] | str]],
        most: int,
    ) -> None:
        """Tokenise a block's passages and keep what is counted of it."""
        passages, rejects = to_rows(records, piece.fields, piece.path)
        lengths = [len(ids) for ids in passage_ids(self._tokenizer, [p.text for p in passages])]
        counted = np.array(lengths, np.int64)
        stratum.blocks.append(Block(piece.file, start, size, lines, len(rejects), counted))
        room = most * (len(self._sample.strata) + 1) - len(self._sample.examples)
        some = list(zip(passages, lengths, strict=True))
        self._sample.examples += some[: max(0, min(room, BLOCK_EXAMPLES))]


def _cut(pieces: list[Piece], parts: int, limits: tuple[int, int]) -> list[Piece]:
    """Choose the blocks: large ones, but so many that their spread can be seen."""
    least, most = limits
    block = min(most, max(least, sum(piece.length for piece in pieces) // parts))
    return [replace(piece, block=block) for piece in pieces]
