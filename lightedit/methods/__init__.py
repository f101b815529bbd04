"""The editing methods, one file each, behind one protocol."""

from lightedit.methods.adaptors.defer import Defer
from lightedit.methods.adaptors.grace import GRACE
from lightedit.methods.adaptors.memory import Memory
from lightedit.methods.closed_form.alphaedit import AlphaEdit
from lightedit.methods.closed_form.emmet import EMMET
from lightedit.methods.closed_form.encore import ENCORE
from lightedit.methods.closed_form.memit import MEMIT
from lightedit.methods.closed_form.pmet import PMET
from lightedit.methods.closed_form.rome import ROME
from lightedit.methods.finetuning.ewc import EWC
from lightedit.methods.finetuning.ft import FT
from lightedit.methods.finetuning.retrain import Retrain
from lightedit.methods.hypernetworks.ke import KE
from lightedit.methods.hypernetworks.mend import MEND
from lightedit.methods.neurons.kn import KN
from lightedit.methods.protocol import Method

METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        *(ROME, MEMIT, EMMET, PMET, AlphaEdit, ENCORE, FT, EWC, Retrain, KN, KE, MEND),
        *(GRACE, Defer, Memory),
    )
}

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
    "METHODS",
    "PMET",
    "ROME",
    "AlphaEdit",
    "Defer",
    "Memory",
    "Method",
    "Retrain",
]
