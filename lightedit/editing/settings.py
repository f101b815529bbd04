"""Settings of a run, shared by Python and the command line."""

from dataclasses import dataclass

from lightedit.errors import ArgumentError
from lightedit.methods.protocol import EditorSettings


@dataclass(frozen=True)
class RunSettings(EditorSettings):
    """Settings of a run that writes facts.

    Attributes:
        facts_per_round: facts written together; by default all, or as many as the method allows.
        facts_per_chunk: facts whose values are optimised together; more is faster and takes more memory.
        validate_every: rounds between validations, which score the facts of all rounds so far; the last round is always
            validated. By default there is no validation.
        outcomes: ask the model about every fact and about other things, before and after; see `Edit.outcomes`.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range.
    """

    facts_per_round: int | None = None
    facts_per_chunk: int = 32
    validate_every: int | None = None
    outcomes: bool = True
    progress_bar: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("facts_per_round", "facts_per_chunk", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")
