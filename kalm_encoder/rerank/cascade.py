"""Which ratios candidates are scored at, coarse first, and how many of the best go on."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_encoder.errors import InputError
from kalm_encoder.table.spec import TableSpec

Stage = tuple[int, int | None]
"""A ratio, and how many of the best scored at it go on; None: all."""


def coarse_stage(spec: TableSpec) -> int:
    """Return the ratio of the first stage under a time budget: the coarsest stored or 8 x r."""
    return max(spec.ratios[-1], 8 * spec.ratios[0])


def plan_stages(
    spec: TableSpec, ratio: int | None, cascade: Sequence[Stage] | None, *, timed: bool
) -> list[Stage]:
    """Return the stages of a request.

    Args:
        spec: of the table.
        ratio: of the only stage; None takes the finest stored.
        cascade: stages instead of a ratio.
        timed: whether there is a time budget, which puts a coarse stage before a lone ratio.

    Raises:
        InputError: ratio and cascade both, stages not from coarse to fine, one that keeps nothing,
            or a ratio that cannot be made from what is stored.
    """
    if cascade is not None and ratio is not None:
        raise InputError("give ratio or cascade, not both")
    fine = spec.ratios[0] if ratio is None else ratio
    stages: list[Stage] = [(fine, None)] if cascade is None else list(cascade)
    if cascade is None and timed and coarse_stage(spec) > fine:
        stages.insert(0, (coarse_stage(spec), None))
    ratios = [stage_ratio for stage_ratio, _ in stages]
    if not stages or ratios != sorted(set(ratios), reverse=True):
        raise InputError(f"cascade {stages} must go from coarse to fine, such as 32:20,4")
    if bad := [keep for _, keep in stages if keep is not None and keep < 1]:
        raise InputError(f"a cascade stage cannot keep {bad[0]} candidates")
    for stage_ratio in ratios:
        spec.source_ratio(stage_ratio)
    return stages
