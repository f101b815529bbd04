"""The editing methods, one small file each; one engine runs them all."""

from lightedit.methods.alphaedit import AlphaEdit
from lightedit.methods.base import Method
from lightedit.methods.emmet import EMMET
from lightedit.methods.encore import ENCORE
from lightedit.methods.memit import MEMIT
from lightedit.methods.pmet import PMET
from lightedit.methods.rome import ROME

METHODS: dict[str, type[Method]] = {method.__name__: method for method in (ROME, MEMIT, EMMET, PMET, AlphaEdit, ENCORE)}

__all__ = ["EMMET", "ENCORE", "MEMIT", "METHODS", "PMET", "ROME", "AlphaEdit", "Method"]
