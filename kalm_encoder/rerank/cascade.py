"""Which ratios candidates are scored at, coarse first, and how many of the best stay."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_encoder.errors import InputError
from kalm_encoder.table.spec import TableSpec

Stage = tuple[int, int | None]
"""A cascade stage: the ratio, and how many of the best candidates go on to the next stage (None:
all)."""


def coarse_ratio(spec: TableSpec) -> int:
    """Return the ratio of the first stage under a time budget: the coarsest stored, or 8 x r."""
    return max(spec.ratios[-1], 8 * spec.ratios[0])


def choose_stages(
    spec: TableSpec, ratio: int | None, cascade: Sequence[Stage] | None, *, timed: bool
) -> list[Stage]:
    """Return the stages of a request.

    Args:
        spec: Spec of the table.
        ratio: Ratio of the only stage; None takes the finest stored.
        cascade: Stages, instead of a ratio.
        timed: Whether there is a time budget. Then a single ratio gets a coarse stage before it.

    Raises:
        InputError: If ratio and cascade are both given, the stages do not go from coarse to fine, a
            stage keeps nothing, or a ratio cannot be made from what is stored.
    """
    if cascade is not None and ratio is not None:
        raise InputError("give ratio or cascade, not both")
    fine = spec.ratios[0] if ratio is None else ratio
    stages: list[Stage] = [(fine, None)] if cascade is None else list(cascade)
    if cascade is None and timed and coarse_ratio(spec) > fine:
        stages.insert(0, (coarse_ratio(spec), None))
    ratios = [stage_ratio for stage_ratio, _ in stages]
    if not stages or ratios != sorted(set(ratios), reverse=True):
        raise InputError(f"cascade {stages} must go from coarse to fine, such as 32:20,4")
    if bad := [keep for _, keep in stages if keep is not None and keep < 1]:
        raise InputError(f"a cascade stage cannot keep {bad[0]} candidates")
    for stage_ratio in ratios:
        spec.source_ratio(stage_ratio)
    return stages
