"""An editor that is no locate-then-edit method: one gradient step on an MLP's matrix and bias, a dense change."""

from dataclasses import dataclass

from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import DenseUpdate
from lightedit.methods.protocol import Editor, Method


class GradientStepEditor(Editor):
    """Lowers the targets' mean NLL by one step along its gradient."""

    def write(self, indices, owner):
        (place,) = self.method.places
        weight, bias = 0.0, 0.0
        for fact in tokenize_facts(self.lm.tokenizer, [self.facts[index] for index in indices], Contexts()):
            row = fact.rows[0]
            with self.lm.probe([place]) as probes:
                logits = self.lm.forward(pad([row.ids], self.lm.pad_id))[0, -len(row.targets) :]
            loss = -logits.log_softmax(-1)[range(len(row.targets)), row.targets].mean() / len(indices)
            loss.backward()
            grads = self.method.lr * probes[place].grads[0].float()
            weight, bias = weight - grads.T @ probes[place].inputs[0].float(), bias - grads.sum(0)
        change = DenseUpdate(weight, None if self.lm.bias(place) is None else bias)
        self.lm.weights.add(owner, place, change)
        return {place: change}


@dataclass(frozen=True)
class GradientStep(Method):
    """One step of gradient descent at `layer`, of size `lr`."""

    layer: int = 1
    lr: float = 0.01
    editor_type = GradientStepEditor

    @property
    def places(self):
        return (Place(self.layer),)
