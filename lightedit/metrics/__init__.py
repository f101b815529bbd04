"""Metrics of knowledge editing."""

from lightedit.metrics.metrics import (
    EditScore,
    EfficacyAccuracy,
    EfficacyMagnitude,
    EfficacyScore,
    GenerationEntropy,
    GenerationSuccess,
    NeighborhoodAccuracy,
    NeighborhoodMagnitude,
    NeighborhoodScore,
    ParaphraseAccuracy,
    ParaphraseMagnitude,
    ParaphraseScore,
    edit_metrics,
)
from lightedit.metrics.records import Generations, PromptScores, RecordScores
from lightedit.metrics.scoring import TargetScores, score_targets

__all__ = [
    "EditScore",
    "EfficacyAccuracy",
    "EfficacyMagnitude",
    "EfficacyScore",
    "GenerationEntropy",
    "GenerationSuccess",
    "Generations",
    "NeighborhoodAccuracy",
    "NeighborhoodMagnitude",
    "NeighborhoodScore",
    "ParaphraseAccuracy",
    "ParaphraseMagnitude",
    "ParaphraseScore",
    "PromptScores",
    "RecordScores",
    "TargetScores",
    "edit_metrics",
    "score_targets",
]
