"""The package's arithmetic hot spots as single operations of PyTorch, in the namespace `lightedit`."""

from lightedit.ops.add_low_rank import add_low_rank_
from lightedit.ops.implementations import NATIVE_STATUS, Implementation, implementations, use
from lightedit.ops.rowwise_low_rank import rowwise_low_rank
from lightedit.ops.second_moment import mirror_, second_moment_
from lightedit.ops.solve import preservation_memorization_solve
from lightedit.ops.target_nll_kl import Head, target_nll_kl

__all__ = [
    "NATIVE_STATUS",
    "Head",
    "Implementation",
    "add_low_rank_",
    "implementations",
    "mirror_",
    "preservation_memorization_solve",
    "rowwise_low_rank",
    "second_moment_",
    "target_nll_kl",
    "use",
]
