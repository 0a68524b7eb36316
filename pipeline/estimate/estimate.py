"""All numbers of an estimate, from a sample of the corpus.

Nano, Small and Large have the same tokenizer, so one sample serves the three.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalm_encoder.table.codecs import CODECS
from kalm_encoder.table.spec import TableSpec
from pipeline.estimate.flops import Dimensions, decoder_flops, encoder_flops
from pipeline.estimate.intervals import Estimate
from pipeline.estimate.rate import Rate
from pipeline.estimate.sampling import Sample
from pipeline.estimate.storage import measure_rows

RATIOS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
QUANTILES = {"min": 0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}
CANDIDATES = 100


def estimate(
    sample: Sample,
    spec: TableSpec,
    seed: int,
    *,
    models: dict[str, Dimensions],
    model: str,
    prompt_tokens: int,
    passages: int | None = None,
    rate: Rate | None = None,
    gpus: int = 1,
) -> dict[str, Any]:
    """Estimate what encoding a corpus will take.

    Args:
        sample: Sample of the corpus.
        spec: Spec of the table to come.
        seed: Seed of the random states of a small table whose size is measured.
        models: Dimensions of the models to compare, by name.
        model: Name of the planned one.
        prompt_tokens: Tokens of a query's whole prompt.
        passages: Number of passages like those of the corpus to estimate for instead.
        rate: Tokens per second of the planned model on one device.
        gpus: Number of devices.

    Returns:
        What `kalm plan --json` prints, with an `Estimate` for each number that has an interval.
        `passages`, `rejected`, `tokens` and `truncated` are at the planned max_length, and `cuts`
        at others. `lengths` are quantiles of the uncut passages in tokens, and the longest seen.
        `documents` are the rows, and `lost_by_truncation` the tokens that they have beyond
        max_length: what is lost unless they are split.
        `bytes` are those of the planned table's data files, with all its ratios, as `kalm status`
        counts them; `storage` has those of other models, dtypes and ratios. `work` says what each
        model takes to encode the corpus, and to score CANDIDATES passages of one query by ratio.

    Raises:
        InputError: Too little was read for an interval.
    """
    lengths = sample.lengths
    cut = np.minimum(lengths, spec.max_length)

    def total(values: NDArray[Any]) -> Estimate:
        return sample.total(sample.per_block(values), passages)

    def total_rows(values: NDArray[Any]) -> Estimate:
        return sample.total(sample.per_block_of_rows(values), passages)

    count, documents = total(np.ones_like(lengths)), total_rows(np.ones_like(sample.rows))
    lost = total_rows(np.maximum(0, sample.rows - spec.max_length))
    states = {r: total(-(-cut // r)) for r in sorted({*RATIOS, *spec.ratios})}
    mean_states = {ratio: number.value / count.value for ratio, number in states.items()}

    def state_bytes(spec: TableSpec, ratio: int) -> Estimate:
        vectors = states[ratio].plus(count.times(spec.codec.extra))
        return vectors.times(spec.bytes_per_state)

    bytes_per_row, index_bytes_per_row = measure_rows(spec, sample.examples, seed)
    data = beside_states = count.times(bytes_per_row)
    for ratio in spec.ratios:
        data = data.plus(state_bytes(spec, ratio))
    cuts = {
        longest: {
            "tokens": total(np.minimum(lengths, longest)),
            "truncated": total(lengths > longest),
        }
        for longest in sorted({*MAX_LENGTHS, spec.max_length})
    }
    flops = {name: total(encoder_flops(size, cut)) for name, size in models.items()}
    storage, work = [], []
    for name, dimensions in models.items():
        for dtype in CODECS:
            other = replace(spec, dim=dimensions.hidden, store_dtype=dtype)
            for ratio in states:
                size = state_bytes(other, ratio).plus(beside_states)
                storage.append({"model": name, "store_dtype": dtype, "ratio": ratio, "bytes": size})
        slower = flops[name].value / flops[model].value
        wide = replace(spec, dim=dimensions.hidden)
        per_candidate = CANDIDATES / count.value
        work.append(
            {
                "model": name,
                "encoder_flops": flops[name],
                "hours": rate and rate.hours(cuts[spec.max_length]["tokens"].times(slower), gpus),
                "query_flops": {
                    ratio: decoder_flops(dimensions, prompt_tokens, number, CANDIDATES)
                    for ratio, number in mean_states.items()
                },
                "query_bytes": {r: per_candidate * state_bytes(wide, r).value for r in states},
            }
        )
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
    return {
        "model": model,
        "spec": spec,
        "exact": sample.complete and passages is None,
        "passages": count,
        "documents": documents,
        "lost_by_truncation": lost,
        "lost_share": lost.value / max(1.0, total_rows(sample.rows).value),
        "rejected": sample.total(sample.rejected, passages),
        **cuts[spec.max_length],
        "lengths": {
            **dict(zip(QUANTILES, map(int, quantiles), strict=True)),
            "max": int(lengths.max()),
        },
        "cuts": [{"max_length": longest, **kept} for longest, kept in cuts.items()],
        "bytes": data,
        "index_bytes": count.times(index_bytes_per_row),
        "storage": storage,
        "work": work,
        "prompt_tokens": prompt_tokens,
        "rate": rate,
        "gpus": gpus,
    }
