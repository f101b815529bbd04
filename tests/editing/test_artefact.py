"""Edits: applied and reverted exactly, saved whole or not at all, and read back to the same bits."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.editing.artefact import Edit, EditError
from lightedit.evaluation.result import Evaluation
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods import MEMIT
from lightedit.methods.closed_form.preservation import Preservation
from lightedit.methods.closed_form.writing import write_facts
from lightedit.runs.provenance import RunRecord
from tests.models import tiny_model, tiny_tokenizer

FACTS = [
    Fact("The capital of {} is", "France", "Rome", target_true="Paris", paraphrase_prompts=("France is led from",)),
    Fact("{} is owned by", "The old tower", "Berlin"),
    Fact("The mother tongue of {} is", "Zoë Müller", "日本語"),
    Fact("{} plays", "Danielle Darrieux", "piano"),
]
FACTS_IN_ROUND = [2, 1, 1]
METHOD = MEMIT(layers=(1, 2), lambda_=3.0)
CONTEXTS = Contexts(("{}", "The river rises. {}"), (0.5, 0.5))

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
BOTH_LAYOUTS = pytest.mark.parametrize("architecture", ["gpt2", "llama"])  # Conv1D is stored transposed


def language_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **kwargs) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, dtype=dtype, **kwargs), tiny_tokenizer("bytelevel"), name="tiny")


def written(lm: LanguageModel) -> Edit:
    """Write several rounds of facts into `lm`, with random targets, as a run does."""
    edit = Edit(
        lm.name,
        lm.fingerprint,
        record=RunRecord({"name": "MEMIT", "note": "日本語"}, on_top_of=("another",), seconds={"values": 1.5}),
        facts=FACTS,
        before=Evaluation({"ES": 0.25}, {"ES": (0.0, 0.5)}, [{"id": "1"}]),
        after=Evaluation({"ES": 1.0}, {"ES": (1.0, 1.0)}, [{"id": "1"}]),
    )
    preservation = {}
    for place in METHOD.places:
        width = lm.weight(place).shape[1]
        keys = torch.randn(width, 3 * width, dtype=torch.float64)
        preservation[place] = Preservation(METHOD.lambda_ * keys @ keys.T / (3 * width))
    start = 0
    for index, count in enumerate(FACTS_IN_ROUND):
        prompts = tokenize_facts(lm.tokenizer, FACTS[start : start + count], CONTEXTS)
        targets = torch.randn(lm.d_model, count, dtype=torch.float64)
        written = write_facts(lm, METHOD, preservation, prompts, targets, edit.owner(index))
        updates = {place: update for place, update, _ in written}
        edit.rounds.append(updates)
        edit.facts_in_round.append(count)
        start += count
    return edit


@torch.no_grad()
def logits(lm: LanguageModel) -> Tensor:
    return lm.forward(pad([[5, 60, 70, 8, 9, 200], [30, 31]], lm.pad_id))


def parameters(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Applying and reverting


@BOTH_DTYPES
@BOTH_LAYOUTS
def test_a_saved_and_loaded_edit_gives_the_same_logits_bit_for_bit(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    lm = language_model(architecture, dtype)
    unedited = logits(lm)
    edit = written(lm)
    edited, matrices = logits(lm), parameters(lm)
    assert not torch.equal(edited, unedited)

    again = language_model(architecture, dtype)
    Edit.load(edit.save(tmp_path / "edit")).apply(again)
    assert same(parameters(again), matrices)
    assert torch.equal(logits(again), edited)

    edit.revert(lm)
    edit.apply(lm)
    assert torch.equal(logits(lm), edited)


@BOTH_DTYPES
@BOTH_LAYOUTS
def test_reverting_gives_every_parameter_back_bit_for_bit(architecture: str, dtype: torch.dtype) -> None:
    lm = language_model(architecture, dtype)
    before = parameters(lm)
    edit = written(lm)
    assert edit.is_applied(lm)
    assert not same(parameters(lm), before)
    edit.revert(lm)
    assert not edit.is_applied(lm)
    assert same(parameters(lm), before)


@BOTH_DTYPES
def test_edits_come_and_go_independently(dtype: torch.dtype) -> None:
    alone, lm = language_model(dtype=dtype), language_model(dtype=dtype)
    first = written(lm)
    second = written(lm)
    first.revert(lm)
    second.apply(alone)
    assert (first.is_applied(lm), second.is_applied(lm)) == (False, True)
    assert same(parameters(lm), parameters(alone))
    first.apply(lm)
    first.revert(lm)
    second.revert(lm)
    assert same(parameters(lm), parameters(language_model(dtype=dtype)))


def test_an_edit_is_applied_once_and_reverted_once() -> None:
    lm = language_model()
    edit = written(lm)
    matrices = parameters(lm)
    with pytest.raises(EditError, match=f"edit {edit.id} is applied already; revert it first"):
        edit.apply(lm)
    assert same(parameters(lm), matrices)
    edit.revert(lm)
    with pytest.raises(EditError, match=f"edit {edit.id} is not applied to tiny"):
        edit.revert(lm)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_edit_of_another_model_is_refused_and_changes_nothing(architecture: str) -> None:
    edit = written(language_model())
    other = language_model(architecture, seed=1)
    before = parameters(other)
    with pytest.raises(EditError, match=f"{edit.fingerprint}, but tiny has {other.fingerprint}"):
        edit.apply(other)
    assert same(parameters(other), before)
    with pytest.raises(EditError, match="not applied"):
        edit.revert(other)


def test_an_edit_names_its_layers_and_rounds() -> None:
    edit = written(language_model())
    assert edit.layers == [1, 2]
    assert len({edit.owner(0), edit.owner(1), Edit("tiny", "0").owner(0)}) == 3
    assert Edit("tiny", "0").layers == []


# Saving and loading


def test_everything_comes_back(tmp_path: Path) -> None:
    edit = written(language_model())
    loaded = Edit.load(edit.save(tmp_path / "new" / "edit"))
    for name in ("model", "fingerprint", "record", "facts", "facts_in_round", "before", "after", "id", "layers"):
        assert getattr(loaded, name) == getattr(edit, name), name
    assert len(loaded.rounds) == len(edit.rounds) == 3
    for one, other in zip(loaded.rounds, edit.rounds, strict=True):
        assert list(one) == list(other)
        for place, update in other.items():
            assert torch.equal(one[place].left, update.left)
            assert torch.equal(one[place].right, update.right)


def test_more_rounds_and_layers_than_ten_keep_their_order(tmp_path: Path) -> None:
    def update(value: float) -> LowRankUpdate:
        return LowRankUpdate(torch.full((4, 1), value), torch.ones(6, 1))

    rounds = [{Place(layer): update(100 * index + layer) for layer in (2, 9, 11)} for index in range(12)]
    edit = Edit("tiny", "0", rounds=rounds, facts_in_round=[1] * 12)
    loaded = Edit.load(edit.save(tmp_path / "edit"))
    assert [list(updates) for updates in loaded.rounds] == [[Place(2), Place(9), Place(11)]] * 12
    for index, updates in enumerate(loaded.rounds):
        assert all(float(update.left[0]) == 100 * index + place.layer for place, update in updates.items())


def test_an_edit_without_rounds_can_be_saved(tmp_path: Path) -> None:
    loaded = Edit.load(Edit("tiny", "0", facts=FACTS).save(tmp_path / "edit"))
    assert loaded.facts == FACTS
    assert loaded.rounds == []


def test_a_saved_edit_is_files_that_others_may_read(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        folder = written(language_model()).save(tmp_path / "edit")
    finally:
        os.umask(previous)
    files = ["edit/after.json", "edit/before.json", "edit/edit.json", "edit/edit.safetensors"]
    assert sorted(contents(tmp_path)) == files
    assert folder.stat().st_mode & 0o777 == 0o755
    assert "日本語" in (folder / "edit.json").read_text(encoding="utf-8")  # readable by eye too


def test_an_existing_folder_is_not_replaced_unless_told(tmp_path: Path) -> None:
    lm = language_model()
    old, new = written(lm), written(lm)
    folder = old.save(tmp_path / "edit")
    with pytest.raises(EditError, match="exists already; choose another folder, or allow overwriting"):
        new.save(folder)
    assert Edit.load(folder).id == old.id
    new.save(folder, overwrite=True)
    assert Edit.load(folder).id == new.id
    assert len(contents(tmp_path)) == 4


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_an_edit_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    edit = Edit("tiny", "0")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("folder", "file"):
        with pytest.raises(EditError, match=f"{name} exists already; choose another folder$"):
            edit.save(tmp_path / name, overwrite=overwrite)
    assert contents(tmp_path) == before


def disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", ["write_bytes", "write_text", "rename"])
def test_a_failing_save_leaves_what_was_there(
    existing: bool, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model()
    old, new = written(lm), written(lm)
    if existing:
        old.save(tmp_path / "edit")
    before = contents(tmp_path)
    rename = Path.rename

    def rename_of_the_new_one_fails(path: Path, target: Path) -> Path:
        return disk_full() if (path / "edit.json").is_file() and id_in(path) == new.id else rename(path, target)

    monkeypatch.setattr(Path, failing, rename_of_the_new_one_fails if failing == "rename" else disk_full)
    with pytest.raises(OSError, match="no space left"):
        new.save(tmp_path / "edit", overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["edit"] if existing else [])


def id_in(folder: Path) -> str:
    return json.loads((folder / "edit.json").read_bytes())["id"]


def test_a_record_that_json_does_not_know_leaves_what_was_there(tmp_path: Path) -> None:
    old = Edit("tiny", "0")
    old.save(tmp_path / "edit")
    with pytest.raises(TypeError):
        Edit("tiny", "0", record=RunRecord({"device": torch.device("cpu")})).save(tmp_path / "edit", overwrite=True)
    assert Edit.load(tmp_path / "edit").id == old.id
    assert len(contents(tmp_path)) == 2


def test_a_folder_without_an_edit_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"no edit in {folder}"):
            Edit.load(folder)


def damage(folder: Path, how: str) -> None:
    tensors, record = folder / "edit.safetensors", folder / "edit.json"
    if how == "no tensors":
        tensors.unlink()
    elif how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif how == "one bit":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif how == "tensors of another edit":
        other = Edit(
            "tiny", "0", rounds=[{Place(1): LowRankUpdate(torch.ones(2, 1), torch.ones(3, 1))}], facts_in_round=[1]
        )
        shutil.copy(other.save(folder.with_name("other")) / "edit.safetensors", tensors)
    elif how == "truncated record":
        record.write_bytes(record.read_bytes()[:-20])
    elif how == "empty record":
        record.write_bytes(b"")
    elif how == "not text":
        record.write_bytes(b"\xff\xfe\x00")
    elif how == "not an object":
        record.write_text("[1, 2]")
    else:
        values = json.loads(record.read_bytes())
        name, value = how.split("=")
        if value == "absent":
            del values[name]
        else:
            values[name] = json.loads(value)
        record.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no tensors", "does not hold a whole edit"),
        ("truncated tensors", "truncated or was altered"),
        ("one bit", "truncated or was altered"),
        ("tensors of another edit", "truncated or was altered"),
        ("truncated record", "does not hold a whole edit"),
        ("empty record", "does not hold a whole edit"),
        ("not text", "does not hold a whole edit"),
        ("not an object", "does not hold a whole edit"),
        ("format=1", "has format 1, this version reads 2"),
        ("format=absent", "does not hold a whole edit"),
        ("fingerprint=absent", "does not hold a whole edit"),
        ("facts_in_round=[2, 1]", "does not hold a whole edit"),
        ("facts_in_round=3", "does not hold a whole edit"),
        ("tensors_sha256=null", "truncated or was altered"),
        ('facts=[{"prompt": "no slot", "subject": "France", "target_new": "Rome"}]', "does not hold a whole edit"),
        ('facts=["France"]', "does not hold a whole edit"),
    ],
)
def test_a_damaged_edit_is_refused(how: str, message: str, tmp_path: Path) -> None:
    folder = written(language_model()).save(tmp_path / "edit")
    damage(folder, how)
    with pytest.raises(EditError, match=message):
        Edit.load(folder)
