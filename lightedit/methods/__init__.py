"""The editing methods, one small file each; one engine runs them all."""

from lightedit.methods.base import Method
from lightedit.methods.memit import MEMIT
from lightedit.methods.rome import ROME

METHODS: dict[str, type[Method]] = {method.__name__: method for method in (MEMIT, ROME)}

__all__ = ["MEMIT", "METHODS", "ROME", "Method"]
