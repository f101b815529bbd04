"""Metrics of knowledge editing."""

from lightedit.metrics.accuracies import (
    EditRetention,
    EfficacyAccuracy,
    EquivalenceAccuracy,
    HeldOutRetention,
    NeighborhoodAccuracy,
    ParaphraseAccuracy,
    PortabilityAccuracy,
    RetainAccuracy,
    SuccessRate,
)
from lightedit.metrics.generated import GenerationEntropy, GenerationSuccess, OwnReferenceScore, ReferenceScore
from lightedit.metrics.records import Generations, PromptScores, RecordScores
from lightedit.metrics.scores import (
    EditScore,
    EfficacyMagnitude,
    EfficacyScore,
    NeighborhoodMagnitude,
    NeighborhoodScore,
    ParaphraseMagnitude,
    ParaphraseScore,
    edit_metrics,
    reported,
)
from lightedit.metrics.scoring import TargetScores, score_targets

__all__ = [
    "EditRetention",
    "EditScore",
    "EfficacyAccuracy",
    "EfficacyMagnitude",
    "EfficacyScore",
    "EquivalenceAccuracy",
    "GenerationEntropy",
    "GenerationSuccess",
    "Generations",
    "HeldOutRetention",
    "NeighborhoodAccuracy",
    "NeighborhoodMagnitude",
    "NeighborhoodScore",
    "OwnReferenceScore",
    "ParaphraseAccuracy",
    "ParaphraseMagnitude",
    "ParaphraseScore",
    "PortabilityAccuracy",
    "PromptScores",
    "RecordScores",
    "ReferenceScore",
    "RetainAccuracy",
    "SuccessRate",
    "TargetScores",
    "edit_metrics",
    "reported",
    "score_targets",
]
