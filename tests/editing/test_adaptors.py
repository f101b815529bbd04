"""An editor whose changes are no weights: modules at a place, which come and go with the edit."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import lightedit as le
from lightedit.lm import Place
from lightedit.lm.changes import Adaptor
from lightedit.lm.reading import Prompts
from lightedit.methods.protocol import Editor, Method
from tests.models import tiny_model, tiny_tokenizer
from tests.plain import WINDOWS
from tests.runs import FACTS, assert_unedited, run, scored, state


@dataclass(frozen=True)
class Shift(Adaptor):
    """Adds one vector to every token's output."""

    vector: Tensor
    kind: ClassVar[str] = "test-shift"

    def __call__(self, inputs: Tensor, output: Tensor, prompts: Prompts) -> Tensor:
        return output + self.vector.to(output)

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        assert len(self.vector) == shape[0]

    def norm(self) -> float:
        return float(self.vector.norm())

    def to(self, device, dtype=None) -> "Shift":
        return Shift(self.vector.to(device, dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector}

    @classmethod
    def from_tensors(cls, tensors, settings) -> "Shift":
        return cls(tensors["vector"])


class ShiftEditor(Editor):
    def write(self, indices, owner):
        (place,) = self.method.places
        change = Shift(torch.full((self.lm.d_model,), float(sum(indices) + 1)))
        self.lm.weights.add(owner, place, change)
        return {place: change}


@dataclass(frozen=True)
class Shifting(Method):
    name: str = "block"
    editor_type = ShiftEditor

    @property
    def places(self):
        return (Place(1, self.name),)


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def logits(lm: le.LanguageModel) -> Tensor:
    return lm.model(torch.tensor([[5, 60, 70, 8, 9]])).logits


@pytest.mark.parametrize("name", ["block", "mlp", "attention"])
def test_an_adaptor_is_applied_watched_saved_loaded_resumed_and_reverted(
    lm: le.LanguageModel, tmp_path: Path, name: str
) -> None:
    unedited, before = logits(lm), state(lm)
    health = le.Health(WINDOWS)
    edit = run(lm, FACTS, Shifting(name), facts_per_round=2, callbacks=[health], checkpoint=tmp_path / "run")
    edited = logits(lm)
    assert (edited - unedited).abs().max() > 0.1 and edit.facts_in_round == [2, 2, 1]
    assert [record["kl"] > 0 for record in health.records] == [True] * 3
    edit.before = edit.after = scored(lm, FACTS)
    edit.save(tmp_path / "edit")
    edit.revert(lm)
    assert_unedited(lm, before)
    assert torch.equal(logits(lm), unedited)
    le.Edit.load(tmp_path / "edit").apply(lm)
    assert torch.equal(logits(lm), edited)
    with lm.weights.unedited():
        assert torch.equal(logits(lm), unedited)
    lm.weights.remove(lm.weights.owners)
    resumed = run(lm, FACTS, Shifting(name), facts_per_round=2, checkpoint=tmp_path / "run")
    assert resumed.facts_in_round == [2, 2, 1] and torch.equal(logits(lm), edited)


def test_a_folder_of_weights_cannot_hold_an_adaptor(lm: le.LanguageModel, tmp_path: Path) -> None:
    run(lm, FACTS[:1], Shifting())
    for export in (le.export_model, le.export_lora):
        with pytest.raises(le.LightEditError, match="module of its own at layer 1 block"):
            export(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()
