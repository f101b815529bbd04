"""The package's arithmetic hot spots as single operations."""

from lightedit.ops.target_nll_kl import Head, target_nll_kl

__all__ = ["Head", "target_nll_kl"]
