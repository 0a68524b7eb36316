"""What encoding a corpus will take, before any of it is spent: from a sample to all the numbers.

Tokens are the same for Nano, Small and Large (one tokenizer), so one sample serves the three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kalm_encoder.table.codecs import CODECS
from kalm_encoder.table.spec import TableSpec
from pipeline.estimate.census import Census, percentiles
from pipeline.estimate.flops import Shape, decoder_flops, encoder_flops
from pipeline.estimate.intervals import Estimate
from pipeline.estimate.rate import Rate
from pipeline.estimate.sample import Sample
from pipeline.estimate.storage import RowCost

RATIOS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
CANDIDATES = 100


@dataclass(frozen=True)
class Cut:
    """What a max_length means: tokens kept, passages cut."""

    max_length: int
    tokens: Estimate
    truncated: Estimate


@dataclass(frozen=True)
class Storage:
    """Data bytes of a table with one ratio."""

    model: str
    store_dtype: str
    ratio: int
    bytes: Estimate


@dataclass(frozen=True)
class Work:
    """Encoding all of it, and scoring CANDIDATES passages of one query, with one model.

    Attributes:
        model: its name.
        encoder_flops: of the corpus.
        hours: at the rate of the plan, scaled by operations for another model than the measured
            one; None without a rate.
        query_flops: by ratio.
        query_bytes: by ratio, of states as stored.
    """

    model: str
    encoder_flops: Estimate
    hours: Estimate | None
    query_flops: dict[int, float]
    query_bytes: dict[int, float]


@dataclass(frozen=True)
class Forecast:
    """The plan of an encode run, as numbers.

    Attributes:
        model: name of the planned one among `work`.
        spec: of the planned table.
        exact: whether all of the corpus was read and nothing is extrapolated.
        passages, rejected, tokens, truncated: at the planned max_length.
        lengths: of uncut passages in tokens, by the names in SHARES, and "max" (seen).
        cuts: at MAX_LENGTHS and the planned one.
        bytes: data files of the planned table, all its ratios: what `kalm status` counts.
        index_bytes: of the indexes.
        storage: of other settings.
        rate: of one device; None if unknown.
        gpus: devices.
    """

    model: str
    spec: TableSpec
    exact: bool
    passages: Estimate
    rejected: Estimate
    tokens: Estimate
    truncated: Estimate
    lengths: dict[str, int]
    cuts: list[Cut]
    bytes: Estimate
    index_bytes: Estimate
    storage: list[Storage]
    work: list[Work]
    prompt_tokens: int
    rate: Rate | None
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is planned.

    Attributes:
        spec: of the table to come.
        model: the planned one among `shapes`.
        shapes: dimensions by name.
        prompt_tokens: of a query's whole prompt.
        passages: plan for so many like the corpus's instead.
        rate: of the planned model on one device.
        gpus: how many devices.
    """

    spec: TableSpec
    model: str
    shapes: dict[str, Shape]
    prompt_tokens: int
    passages: int | None = None
    rate: Rate | None = None
    gpus: int = 1


def forecast(sample: Sample, request: Request, row_cost: RowCost) -> Forecast:
    """Put the plan together.

    Args:
        sample: of the corpus.
        request: what is planned.
        row_cost: of a passage beside its states.

    Raises:
        InputError: too little was read for an interval.
    """
    spec, census = request.spec, Census(sample, request.passages)
    count = census.of(lambda b: len(b.lengths), a_line=True)
    states = {ratio: _states(census, spec, ratio) for ratio in sorted({*RATIOS, *spec.ratios})}
    mean_states = {ratio: number.value / count.value for ratio, number in states.items()}
    light = count.times(row_cost.data)
    data = light
    for ratio in spec.ratios:
        data = data.plus(states[ratio].times(spec.bytes_per_state))
    cuts = [_cut_at(census, length) for length in sorted({*MAX_LENGTHS, spec.max_length})]
    chosen = next(cut for cut in cuts if cut.max_length == spec.max_length)
    return Forecast(
        model=request.model,
        spec=spec,
        exact=sample.complete and request.passages is None,
        passages=count,
        rejected=census.of(lambda b: b.rejected, a_line=True),
        tokens=chosen.tokens,
        truncated=chosen.truncated,
        lengths=percentiles(sample),
        cuts=cuts,
        bytes=data,
        index_bytes=count.times(row_cost.index),
        storage=_storage(request, states, light),
        work=_work(census, request, chosen.tokens, mean_states),
        prompt_tokens=request.prompt_tokens,
        rate=request.rate,
        gpus=request.gpus,
    )


def _states(census: Census, spec: TableSpec, ratio: int) -> Estimate:
    return census.of(lambda b: (-(-np.minimum(b.lengths, spec.max_length) // ratio)).sum())


def _cut_at(census: Census, length: int) -> Cut:
    return Cut(
        length,
        census.of(lambda b: np.minimum(b.lengths, length).sum()),
        census.of(lambda b: (b.lengths > length).sum()),
    )


def _storage(request: Request, states: dict[int, Estimate], light: Estimate) -> list[Storage]:
    return [
        Storage(name, dtype, ratio, number.times(other.bytes_per_state).plus(light))
        for name, shape in request.shapes.items()
        for dtype in CODECS
        for other in [replace(request.spec, dim=shape.hidden, store_dtype=dtype)]
        for ratio, number in states.items()
    ]


def _work(
    census: Census, request: Request, tokens: Estimate, mean_states: dict[int, float]
) -> list[Work]:
    """Return the work of each model; `mean_states` is of a passage, by ratio."""
    longest = request.spec.max_length

    def encoding(shape: Shape) -> Estimate:
        return census.of(lambda b: encoder_flops(shape, np.minimum(b.lengths, longest)).sum())

    flops = {name: encoding(shape) for name, shape in request.shapes.items()}
    work = []
    for name, shape in request.shapes.items():
        slower = flops[name].value / flops[request.model].value
        hours = _hours(tokens.times(slower), request.rate, request.gpus) if request.rate else None
        size = CANDIDATES * replace(request.spec, dim=shape.hidden).bytes_per_state
        query = {
            ratio: decoder_flops(shape, request.prompt_tokens, number, CANDIDATES)
            for ratio, number in mean_states.items()
        }
        work.append(
            Work(name, flops[name], hours, query, {r: size * n for r, n in mean_states.items()})
        )
    return work


def _hours(tokens: Estimate, rate: Rate, gpus: int) -> Estimate:
    """Return hours on `gpus` devices; the interval holds those of tokens and of the rate."""
    a_second = 3600.0 * gpus
    return Estimate(
        tokens.value / (rate.tokens_per_s * a_second),
        tokens.low / (rate.high * a_second),
        tokens.high / (rate.low * a_second),
    )
