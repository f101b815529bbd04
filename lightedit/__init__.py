"""lightedit: edit facts in transformer language models; evaluate, save, export and revert the edits."""

from lightedit.analysis.found_neurons import Neurons
from lightedit.analysis.hidden_settings import HiddenStateSettings
from lightedit.analysis.hidden_states import hidden_states
from lightedit.analysis.localization.result import LocalizationStudy
from lightedit.analysis.localization.settings import LocalizationSettings
from lightedit.analysis.localization.study import localization_study
from lightedit.analysis.neuron_settings import NeuronSettings
from lightedit.analysis.neurons import neurons
from lightedit.analysis.settings import TraceSettings
from lightedit.analysis.similarities import HiddenStates
from lightedit.analysis.streaming.result import Stream
from lightedit.analysis.streaming.run import stream
from lightedit.analysis.streaming.settings import StreamSettings
from lightedit.analysis.trace import Trace
from lightedit.analysis.tracing import trace
from lightedit.analysis.update_norms import UpdateNorms, update_norms
from lightedit.data.builtin import builtin_facts
from lightedit.data.examples import Example, read_examples
from lightedit.data.fact import served_as
from lightedit.data.facts import Fact, FactError, read_facts, write_facts
from lightedit.data.modules import FactsDataModule
from lightedit.data.prompts import ContextSettings
from lightedit.editing.artefact import Edit, EditError
from lightedit.editing.checkpoint import RoundCheckpoint
from lightedit.editing.export import export_lora, export_model
from lightedit.editing.fact_base import FactBase
from lightedit.editing.health import Health, HealthLimits
from lightedit.editing.module import EditModule
from lightedit.editing.observing import Outcomes
from lightedit.editing.outcomes import Damage, Outcome
from lightedit.editing.run import edit
from lightedit.editing.settings import RunSettings
from lightedit.editing.trials import TuningSettings
from lightedit.editing.tuning import tune
from lightedit.errors import LightEditError, UnsupportedModelError
from lightedit.evaluation.evaluate import evaluate
from lightedit.evaluation.references import References, read_references, write_references
from lightedit.evaluation.result import Evaluation
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.evaluation.single import evaluate_single
from lightedit.lm.architectures import Architecture, register_architecture
from lightedit.lm.model import LanguageModel
from lightedit.methods import (
    EMMET,
    ENCORE,
    EWC,
    FT,
    GRACE,
    KE,
    KN,
    MEMIT,
    MEND,
    PMET,
    ROME,
    AlphaEdit,
    Defer,
    Memory,
    Method,
    Retrain,
)
from lightedit.methods.closed_form.stopping import KLBelow, MostProbable
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.methods.hypernetworks.examples import EditorTrainingSettings
from lightedit.methods.hypernetworks.training import train_editor
from lightedit.methods.neurons.search import NeuronSearch
from lightedit.reports.page import report
from lightedit.runs.folder import ResumeError
from lightedit.statistics.covariance import Covariance, CovarianceError
from lightedit.statistics.estimation import estimate_covariance
from lightedit.sweeps.run import sweep
from lightedit.training.models import T5Size, train_classifier, train_t5
from lightedit.training.settings import TrainingSettings

__version__ = "0.1.0"

__all__ = [
    "EMMET",
    "ENCORE",
    "EWC",
    "FT",
    "GRACE",
    "KE",
    "KN",
    "MEMIT",
    "MEND",
    "PMET",
    "ROME",
    "AlphaEdit",
    "Architecture",
    "ContextSettings",
    "Covariance",
    "CovarianceError",
    "Damage",
    "Defer",
    "Edit",
    "EditError",
    "EditModule",
    "EditorTrainingSettings",
    "Evaluation",
    "EvaluationSettings",
    "Example",
    "Fact",
    "FactBase",
    "FactError",
    "FactsDataModule",
    "Health",
    "HealthLimits",
    "HiddenStateSettings",
    "HiddenStates",
    "KLBelow",
    "LanguageModel",
    "LightEditError",
    "LocalizationSettings",
    "LocalizationStudy",
    "Memory",
    "Method",
    "MostProbable",
    "NeuronSearch",
    "NeuronSettings",
    "Neurons",
    "Outcome",
    "Outcomes",
    "References",
    "ResumeError",
    "Retrain",
    "RoundCheckpoint",
    "RunSettings",
    "Stream",
    "StreamSettings",
    "T5Size",
    "Trace",
    "TraceSettings",
    "TrainingSettings",
    "TuningSettings",
    "UnsupportedModelError",
    "UpdateNorms",
    "ValueSettings",
    "builtin_facts",
    "edit",
    "estimate_covariance",
    "evaluate",
    "evaluate_single",
    "export_lora",
    "export_model",
    "hidden_states",
    "localization_study",
    "neurons",
    "read_examples",
    "read_facts",
    "read_references",
    "register_architecture",
    "report",
    "served_as",
    "stream",
    "sweep",
    "trace",
    "train_classifier",
    "train_editor",
    "train_t5",
    "tune",
    "update_norms",
    "write_facts",
    "write_references",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"])
