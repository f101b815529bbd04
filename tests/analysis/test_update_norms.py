import csv
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.changes import Adaptor, Change, DenseUpdate, LowRankUpdate


class Doubling(Adaptor):
    """An adaptor for one test; it has no `kind`, so it is not registered."""

    def __call__(self, inputs, output):
        return 2 * output

    def check(self, place, shape):
        pass

    def norm(self):
        return 1.0

    def to(self, device, dtype=None):
        return self

    def tensors(self):
        return {}

    @classmethod
    def from_tensors(cls, tensors, settings):
        return cls()


def an_edit(*rounds: dict[Place, Change], fingerprint: str = "abc", method: str = "PMET") -> le.Edit:
    edit = le.Edit("tiny", fingerprint, rounds=list(rounds), facts_in_round=[1] * len(rounds))
    edit.record.method["name"] = method
    return edit


def low_rank(left: list[float], right: list[float]) -> LowRankUpdate:
    return LowRankUpdate(torch.tensor(left)[:, None], torch.tensor(right)[:, None])


ONE = an_edit({Place(1): low_rank([3.0, 4.0], [2.0, 0.0, 0.0]), Place(2, "attention_out"): low_rank([1.0], [0.0, 2.0])})
ROUNDS = an_edit(
    {Place(1): low_rank([3.0, 4.0], [1.0, 0.0, 0.0])},
    {Place(1): low_rank([3.0, 4.0], [0.0, 0.0, -1.0]), Place(3): DenseUpdate(torch.eye(4), torch.full((4,), 0.0))},
)


def test_a_norm_is_that_of_the_whole_matrix_over_all_rounds() -> None:
    norms = le.update_norms({"one": ONE, "rounds": ROUNDS}).norms
    assert norms["one"] == pytest.approx({Place(1): 10.0, Place(2, "attention_out"): 2.0})
    assert norms["rounds"] == pytest.approx({Place(1): 50**0.5, Place(3): 2.0})
    undone = an_edit({Place(1): low_rank([1.0], [1.0])}, {Place(1): low_rank([1.0], [-1.0])})
    assert le.update_norms(undone).norms["PMET"] == {Place(1): 0.0}


def test_edits_are_named_by_their_folder_or_method(tmp_path: Path) -> None:
    folder = ONE.save(tmp_path / "even spread")
    assert list(le.update_norms([folder, ONE, ROUNDS, str(folder)]).norms) == [
        *("even spread", "PMET", "PMET 2", "even spread 2")
    ]
    assert list(le.update_norms(folder).norms) == ["even spread"]
    assert le.update_norms(folder).norms["even spread"] == le.update_norms(ONE).norms["PMET"]


def test_norms_are_saved_as_a_table_and_a_figure(tmp_path: Path) -> None:
    norms = le.update_norms({"PMET": ONE, "without attention": ROUNDS})
    assert norms.save(tmp_path / "norms") == tmp_path / "norms"
    assert {file.name for file in (tmp_path / "norms").iterdir()} == {
        f"update_norms.{kind}" for kind in ("csv", "svg", "png")
    }
    with (tmp_path / "norms" / "update_norms.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row.values())[:3] for row in rows] == [
        ("PMET", "1", "mlp"),
        ("PMET", "2", "attention_out"),
        ("without attention", "1", "mlp"),
        ("without attention", "3", "mlp"),
    ]
    assert list(rows[0]) == ["edit", "layer", "place", "norm"] and float(rows[0]["norm"]) == pytest.approx(10)
    text = (tmp_path / "norms" / "update_norms.svg").read_text()
    assert "second matrix" in text and "output matrix" in text and ">without attention<" in text


def test_norms_are_printed() -> None:
    assert str(le.update_norms(ONE)).splitlines() == [
        "norm of ΔW by layer in tiny:", "  PMET: layer 1 10, layer 2 attention_out 2",
    ]  # fmt: skip


def test_edits_of_different_models_are_refused() -> None:
    with pytest.raises(le.EditError, match="'b' was made for tiny with fingerprint other, but 'a'"):
        le.update_norms({"a": ONE, "b": an_edit(fingerprint="other")})


def test_wrong_edits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="none given"):
        le.update_norms([])
    with pytest.raises(FileNotFoundError, match="no edit"):
        le.update_norms([tmp_path])
    with pytest.raises(ArgumentError, match="edit 'PMET', layer 1 is changed by an adaptor"):
        le.update_norms(an_edit({Place(1): Doubling()}))
    with pytest.raises(ArgumentError, match="none of them changes a matrix"):
        le.update_norms(an_edit()).save(tmp_path / "none")
    assert not (tmp_path / "none").exists()
