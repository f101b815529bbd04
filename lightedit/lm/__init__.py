"""The language model that is edited."""

from lightedit.lm.matrix import Matrix
from lightedit.lm.model import LanguageModel

__all__ = ["LanguageModel", "Matrix"]
