"""VBench's normalisation and totals (`scripts/cal_final_score.py` of the official repository, restated)."""

from __future__ import annotations

from collections.abc import Mapping

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
# dimension: least and greatest raw value (not clipped), weight within its group
QUALITY: dict[str, tuple[float, float, float]] = {
    "subject_consistency": (0.1462, 1.0, 1),
    "background_consistency": (0.2615, 1.0, 1),
    "temporal_flickering": (0.6293, 1.0, 1),
    "motion_smoothness": (0.706, 0.9975, 1),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1),
    "imaging_quality": (0.0, 1.0, 1),
}
SEMANTIC: dict[str, tuple[float, float, float]] = {
    "object_class": (0.0, 1.0, 1),
    "multiple_objects": (0.0, 1.0, 1),
    "human_action": (0.0, 1.0, 1),
    "color": (0.0, 1.0, 1),
    "spatial_relationship": (0.0, 1.0, 1),
    "scene": (0.0, 0.8222, 1),
    "appearance_style": (0.0009, 0.2855, 1),
    "temporal_style": (0.0, 0.364, 1),
    "overall_consistency": (0.0, 0.364, 1),
}
DIMENSIONS = {**QUALITY, **SEMANTIC}


def normalised(dimension: str, raw: float) -> float:
    """The raw aggregate of a dimension on the scale of the totals."""
    least, greatest, _ = DIMENSIONS[dimension]
    return (raw - least) / (greatest - least)


def totals(raw: Mapping[str, float | None]) -> dict[str, float | None]:
    """Quality, Semantic and Total; each None where one of its dimensions is missing.

    The official script counts what is missing as a raw 0, which is lower than the worst video: so do we not.
    """

    def mean(group: Mapping[str, tuple[float, float, float]]) -> float | None:
        values = [(raw.get(name), weight, name) for name, (_, _, weight) in group.items()]
        if any(value is None for value, *_ in values):
            return None
        weighted = sum(
            normalised(name, value) * weight for value, weight, name in values if value is not None
        )
        return weighted / sum(weight for _, weight, _ in values)

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {"quality": quality, "semantic": semantic, "total": total}
