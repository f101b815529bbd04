"""Settings of an evaluation, shared by Python and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightedit.data.texts import read_texts
from lightedit.errors import ArgumentError
from lightedit.evaluation.harness import check_harness


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation on facts, and of further measurements.

    Attributes:
        batch_size: most texts of one forward pass; bounds memory, and does not change a score.
        generate: also generate texts, for generation entropy (GE) and success; takes several times as long.
        text: held-out text for perplexity and KL to the unedited model: a .txt file or a data set, of which 2048 tokens
            are read, or token windows.
        harness: tasks of the lm-evaluation-harness to run too, such as [piqa,arc_easy], or .yaml files of its format.
        harness_limit: use only this many first examples of each such task.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: `batch_size` or `harness_limit` is below 1, or `harness` is one name rather than several.
    """

    batch_size: int = 64
    generate: bool = False
    text: str | Path | Sequence[Sequence[int]] | None = None
    harness: Sequence[str] = ()
    harness_limit: int | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, got {self.batch_size}")
        if isinstance(self.harness, str):
            raise ArgumentError(f"harness: expected a list of tasks, got {self.harness!r}; give [{self.harness!r}]")
        object.__setattr__(self, "harness", tuple(self.harness))
        if self.harness_limit is not None and self.harness_limit < 1:
            raise ArgumentError(f"harness_limit: got {self.harness_limit} examples of a task, expected at least 1")

    def check(self) -> None:
        """Check, before a model is loaded, that packages, files and tasks exist.

        Raises:
            FileNotFoundError: the text file or the file of a task does not exist.
            ImportError: the harness, or the reader of data sets, is not installed.
            ArgumentError: the harness does not know a task, or the text cannot be read.
            RuntimeError: the data set of texts could not be opened.
        """
        if self.harness:
            check_harness(self.harness, self.harness_limit)
        if isinstance(self.text, str | Path):
            read_texts(self.text)


DEFAULTS = EvaluationSettings()
"""Scores on the facts' own prompts only."""
