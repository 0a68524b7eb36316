"""A look at a corpus in bounded time: blocks of it, drawn at random and tokenised.

Blocks are drawn without replacement, each with the same chance. A corpus that is read to its end
within the time is known exactly.
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalm_encoder.errors import InputError
from kalm_encoder.model.tokens import passage_ids
from pipeline.corpus.inputs import InputFile
from pipeline.corpus.passages import FieldOptions, Passage, to_rows
from pipeline.corpus.reading import readings
from pipeline.corpus.shards import ShardRows
from pipeline.corpus.splitting import Splitter
from pipeline.estimate.intervals import Estimate, ratio_estimate
from pipeline.estimate.sources import BlockSource, open_sources
from pipeline.run.first_look import id_field_remedy

MIN_BLOCKS, MAX_BLOCKS = 30, 20_000
"""Fewer blocks make the interval meaningless, so this many are read even if the time is up."""
TYPICAL_BLOCKS = 256
"""A small corpus is cut into about so many blocks: large ones, but their spread can be seen."""
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 1 << 12, 1 << 16
MAX_IN_ORDER = 200
"""Files that can only be read from their start and are sampled, because each stays open. If there
are more of them, so many drawn at random stand for all."""
MAX_EXAMPLES, MAX_BLOCK_EXAMPLES = 4000, 100
"""Passages that are kept of the sample, and of one block."""


@dataclass(frozen=True)
class Sample:
    """The part of a corpus that was seen.

    Attributes:
        sizes: (blocks,) float64 bytes of text in each block.
        rejected: (blocks,) int64 rejects in each block.
        lengths: (passages,) int64 tokens of each rendered passage, not cut.
        block_of: (passages,) int64 number of the block of each passage.
        rows: (rows,) int64 tokens of each rendered row, not cut: the documents, if they are split.
        block_of_row: (rows,) int64 number of the block of each row.
        size: Bytes of text in the corpus, in the unit of `sizes`.
        complete: Whether all of the corpus was read.
        examples: Some passages and their tokens.
        seconds: Time that it took.
        notes: What a reader must know of how the sample was drawn.
        readings: How the files are read, and which options choose another reading.
    """

    sizes: NDArray[np.float64]
    rejected: NDArray[np.int64]
    lengths: NDArray[np.int64]
    block_of: NDArray[np.int64]
    rows: NDArray[np.int64]
    block_of_row: NDArray[np.int64]
    size: float
    complete: bool
    examples: list[tuple[Passage, int]]
    seconds: float
    notes: list[str]
    readings: list[str]

    def per_block(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the (blocks,) sums of (passages,) values."""
        return np.bincount(self.block_of, values, minlength=len(self.sizes))

    def per_block_of_rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the (blocks,) sums of (rows,) values."""
        return np.bincount(self.block_of_row, values, minlength=len(self.sizes))

    def total(self, y: NDArray[Any], passages: int | None = None) -> Estimate:
        """Estimate the total of a quantity in the corpus.

        Args:
            y: (blocks,) the quantity in each block.
            passages: If given, the total is that of so many other passages like the corpus's own.
        """
        if passages is not None:
            count = self.per_block(np.ones_like(self.lengths))
            return ratio_estimate(y, count, passages, covered=0)
        if self.complete:
            return Estimate(*[float(y.sum())] * 3)
        return ratio_estimate(y, self.sizes, self.size, covered=self.sizes.sum() / self.size)


def sample_corpus(
    files: Sequence[InputFile],
    tokenizer: Any,
    *,
    fields: FieldOptions,
    seconds: float,
    seed: int,
    split: Splitter | None = None,
    storage_options: dict[str, str] | None = None,
) -> Sample:
    """Read and tokenise blocks of a corpus until the time is up.

    Args:
        files: Corpus files, from `expand_inputs`.
        tokenizer: Tokenizer of the model.
        fields: Fields that the user named.
        seconds: Time to spend; MIN_BLOCKS are read in any case.
        seed: Seed of the draw.
        split: Cuts documents into passages; None if rows are passages.
        storage_options: Options of the object store.

    Raises:
        InputError: A file cannot be read or has no id or text field, or no passage was found.
    """
    began, rng = time.monotonic(), random.Random(seed)
    found = [s for file in files for s in open_sources(file, fields, storage_options)]
    sources = _bounded(found, rng)
    size = sum(source.size * source.stands_for for source in sources)
    block_bytes = min(MAX_BLOCK_BYTES, max(MIN_BLOCK_BYTES, size / TYPICAL_BLOCKS))
    counts = [math.ceil(source.size / block_bytes) for source in sources]
    drawable = [math.ceil(s.size * s.stands_for / block_bytes) for s in sources]
    starts = list(accumulate(drawable, initial=0))
    read: Counter[int] = Counter()
    sizes: list[float] = []
    rejected: list[int] = []
    lengths: list[list[int]] = []
    whole: list[list[int]] = []
    examples: list[tuple[Passage, int]] = []
    ids: set[int] = set()  # hashes: a long sample has millions
    for number in rng.sample(range(starts[-1]), min(starts[-1], MAX_BLOCKS)):
        if len(sizes) >= MIN_BLOCKS and time.monotonic() > began + seconds:
            break
        i = bisect_right(starts, number) - 1
        share, rows = sources[i].read(number - starts[i], counts[i])
        passages, rejects = to_rows(rows, sources[i].fields, sources[i].path)
        tokens = passage_ids(tokenizer, [p.text for p in passages])[1].tolist()
        ids.update(hash(passage.id) for passage in passages)
        whole.append(tokens)
        if split is not None:
            passages, rejects, _ = split(ShardRows(passages, rejects), sources[i].path)
            tokens = passage_ids(tokenizer, [p.text for p in passages])[1].tolist()
        read[i] += 1
        sizes.append(share * sources[i].size)
        rejected.append(len(rejects))
        lengths.append(tokens)
        room = min(MAX_BLOCK_EXAMPLES, MAX_EXAMPLES - len(examples))
        examples += list(zip(passages, tokens, strict=True))[:room]
    if not any(lengths):
        raise InputError(f"no passage found in {', '.join(file.path for file in files[:3])}")
    complete = read.total() == starts[-1] and len(sources) == len(found)
    finished = sum(s.in_order and read[i] >= counts[i] for i, s in enumerate(sources))
    in_order = sum(source.in_order for source in found)
    notes = []
    if repeated := sum(map(len, whole)) - len(ids):
        notes = [
            f"{repeated:,} of the sampled passages repeat an id, which `kalm encode` refuses "
            f"without --on-duplicate. {id_field_remedy(source.fields for source in sources)}"
        ]
    note = (
        f"{in_order} compressed or quoted files can only be read from their start, and "
        f"{finished} were read to the end: their intervals hold if the rest is like it"
    )
    passage_tokens, block_of = _flat(lengths)
    row_tokens, block_of_row = _flat(whole)
    return Sample(
        sizes=np.array(sizes),
        rejected=np.array(rejected),
        lengths=passage_tokens,
        block_of=block_of,
        rows=row_tokens,
        block_of_row=block_of_row,
        size=size,
        complete=complete,
        examples=examples,
        seconds=time.monotonic() - began,
        notes=notes if complete or not in_order else [*notes, note],
        readings=readings((source.path, source.fields, source.cells) for source in found),
    )


def _flat(blocks: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the values of all blocks in one array, and the number of the block of each."""
    values = np.concatenate([np.array(block, np.int64) for block in blocks])
    return values, np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])


def _bounded(sources: list[BlockSource], rng: random.Random) -> list[BlockSource]:
    """Drop files beyond MAX_IN_ORDER; those that stay count for the dropped ones too."""
    in_order = [source for source in sources if source.in_order]
    if len(in_order) <= MAX_IN_ORDER:
        return sources
    kept = rng.sample(in_order, MAX_IN_ORDER)
    factor = sum(source.size for source in in_order) / sum(source.size for source in kept)
    others = [source for source in sources if not source.in_order]
    return others + [replace(source, stands_for=factor) for source in kept]
