"""The language model that is edited."""

from lightedit.lm.model import LanguageModel
from lightedit.lm.place import Place

__all__ = ["LanguageModel", "Place"]
