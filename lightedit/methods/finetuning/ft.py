"""Fine-tuning: gradient descent on the weights of some layers."""

from dataclasses import dataclass
from typing import ClassVar

from lightedit.methods.finetuning.editor import FineTuningEditor
from lightedit.methods.finetuning.method import FineTuning
from lightedit.methods.protocol import Editor


@dataclass(frozen=True)
class FT(FineTuning):
    """Fine-tuning, the baseline of the published tables: FT and FT-L (Zhu et al., 2020, arXiv 2012.00363), FT-W, FT-M.

    With `norm` it is FT-L. With parts "block" and weight_decay "power_law" it is FT-W of MEMIT's tables. The default
    loss is that of FT-M. Epochs over shuffled mini-batches are LocFT-BF's (arXiv 2509.22072).
    """

    editor_type: ClassVar[type[Editor]] = FineTuningEditor
