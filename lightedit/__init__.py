"""lightedit: edit facts in transformer language models, and be able to ship, undo and trust the edit."""

from lightedit.covariance import Covariance, CovarianceError
from lightedit.data.builtin import builtin_facts
from lightedit.data.facts import Fact, FactError, read_facts, write_facts
from lightedit.data.modules import FactsDataModule
from lightedit.edit import Edit, EditError
from lightedit.estimation import estimate_covariance
from lightedit.evaluate import evaluate
from lightedit.evaluation import Evaluation
from lightedit.export import export_lora, export_model
from lightedit.health import Health
from lightedit.lm import LanguageModel, Matrix
from lightedit.methods import EMMET, ENCORE, MEMIT, PMET, ROME, AlphaEdit, Method
from lightedit.module import EditModule
from lightedit.references import References, read_references, write_references
from lightedit.report import report
from lightedit.resume import RoundCheckpoint
from lightedit.run import edit
from lightedit.run_folder import ResumeError
from lightedit.single import evaluate_single
from lightedit.stopping import KLBelow, MostProbable
from lightedit.sweep import sweep
from lightedit.values import ValueSettings

__version__ = "0.1.0"

__all__ = [
    "EMMET",
    "ENCORE",
    "MEMIT",
    "PMET",
    "ROME",
    "AlphaEdit",
    "Covariance",
    "CovarianceError",
    "Edit",
    "EditError",
    "EditModule",
    "Evaluation",
    "Fact",
    "FactError",
    "FactsDataModule",
    "Health",
    "KLBelow",
    "LanguageModel",
    "Matrix",
    "Method",
    "MostProbable",
    "References",
    "ResumeError",
    "RoundCheckpoint",
    "ValueSettings",
    "builtin_facts",
    "edit",
    "estimate_covariance",
    "evaluate",
    "evaluate_single",
    "export_lora",
    "export_model",
    "read_facts",
    "read_references",
    "report",
    "sweep",
    "write_facts",
    "write_references",
]
