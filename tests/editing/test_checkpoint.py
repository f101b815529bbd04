"""A run that is stopped at any moment and started again ends with the bits of one that was never stopped."""

import csv
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

import lightedit as le
from lightedit.__main__ import main
from lightedit.data.prompts import ContextSettings
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.preservation import Preservation
from lightedit.runs.folder import kept_rounds
from lightedit.statistics.covariance import Provenance
from tests.models import tiny_model, tiny_tokenizer

VALUES = le.ValueSettings(lr=0.3, steps=4, clamp_norm_factor=2.0)
METHOD = le.MEMIT(layers=(1, 2), values=VALUES, contexts=ContextSettings(prefixes=(("The", 1, 5),)), lambda_=5.0)
FACTS = [
    le.Fact("The capital of {}", "France", "Rome", target_true="Paris"),
    le.Fact("{} is a city in the north of", "Old London Town", "Spain", target_true="England"),
    le.Fact("It is said that the river {} flows through", "Rhine", "Paris", target_true="Bonn"),
    le.Fact("The music of {} was", "Mozart", "loud", target_true="quiet"),
    le.Fact("{} speaks the language", "A girl from Peru", "French", target_true="Spanish"),
]
ROUNDS = 3  # of at most two facts


class Stopped(Exception):
    pass


class StopAfter(Callback):
    """Fails as the round after `rounds` finished ones begins."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.rounds:
            raise Stopped


def model(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, seed, dtype=dtype), tiny_tokenizer("bytelevel"))


def covariance_of(lm: le.LanguageModel, seed: int = 0) -> le.Covariance:
    moments = {}
    for layer in METHOD.layers:
        generator = torch.Generator().manual_seed(seed + layer)
        keys = torch.randn(500, lm.weight(Place(layer)).shape[1], generator=generator)
        moments[Place(layer)] = keys.T @ keys / 500
    return le.Covariance(moments, Provenance(lm.name, lm.fingerprint, "noise", 500, 8, "float32"))


def fit(lm: le.LanguageModel, folder: Path | None, *callbacks: Callback, **changes: Any) -> le.Edit:
    """Run a trainer as a user would; `changes` are settings of the run."""
    kind = changes.get("module", le.EditModule)
    covariance = changes.get("covariance") or covariance_of(lm)
    module = kind(lm, changes.get("method", METHOD), covariance=covariance, settings=changes.get("settings"))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=changes.get("max_epochs", 100),
        logger=changes.get("logger", False),
        log_every_n_steps=1,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=changes.get("limit_val_batches", 0),
        callbacks=[*callbacks, *([le.RoundCheckpoint(folder)] if folder else [])],
    )
    data = le.FactsDataModule(
        changes.get("facts", FACTS), changes.get("facts_per_round", 2), changes.get("facts_per_chunk", 32)
    )
    trainer.fit(module, datamodule=data)
    return module.edit


def stop(folder: Path, rounds: int, lm: le.LanguageModel | None = None) -> None:
    with pytest.raises(Stopped):
        fit(lm or model(), folder, StopAfter(rounds))
    assert len(kept_rounds(folder)) == rounds


def weights(lm: le.LanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


def assert_same(lm: le.LanguageModel, edit: le.Edit, expected_lm: le.LanguageModel, expected: le.Edit) -> None:
    for name, parameter in weights(expected_lm).items():
        assert torch.equal(lm.model.get_parameter(name), parameter), name
    assert_same_edit(edit, expected)


def assert_same_edit(edit: le.Edit, expected: le.Edit) -> None:
    assert edit.facts == expected.facts and edit.facts_in_round == expected.facts_in_round
    assert [list(updates) for updates in edit.rounds] == [list(updates) for updates in expected.rounds]
    for updates, others in zip(edit.rounds, expected.rounds, strict=True):
        for layer, update in updates.items():
            assert torch.equal(update.left, others[layer].left) and torch.equal(update.right, others[layer].right)
    assert replace(edit.record, seconds={}) == replace(expected.record, seconds={})
    assert edit.record.seconds.keys() == expected.record.seconds.keys()


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[le.LanguageModel, le.Edit]:
    lm = model()
    return lm, fit(lm, None)


# The same bits


@pytest.mark.parametrize("rounds", range(ROUNDS))
@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_a_run_stopped_after_any_round_ends_with_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str, dtype: torch.dtype, rounds: int
) -> None:
    expected_lm = model(architecture, dtype)
    expected = fit(expected_lm, None)
    stop(tmp_path, rounds, model(architecture, dtype))
    lm = model(architecture, dtype)
    edit = fit(lm, tmp_path)
    assert_same(lm, edit, expected_lm, expected)
    assert len(kept_rounds(tmp_path)) == ROUNDS
    assert (f"continuing after round {rounds} of {ROUNDS}" in capsys.readouterr().err) == (rounds > 0)
    edit.revert(lm)
    assert all(torch.equal(lm.model.get_parameter(n), p) for n, p in weights(model(architecture, dtype)).items())


@pytest.mark.parametrize(
    "method",
    [
        le.ENCORE(layers=(1, 2), values=VALUES, contexts=ContextSettings(prefixes=()), lambda_=5.0),
        le.AlphaEdit(
            layers=(1, 2), values=VALUES, contexts=ContextSettings(prefixes=()), threshold=0.5, relative=True, ridge=0.1
        ),
    ],
    ids=lambda method: type(method).__name__,
)
def test_past_keys_are_remembered_again(tmp_path: Path, method: le.Method) -> None:
    expected_lm, forgetful, lm = model(), model(), model()
    expected = fit(expected_lm, None, method=method, facts_per_round=1)
    with pytest.raises(Stopped):
        fit(model(), tmp_path, StopAfter(3), method=method, facts_per_round=1)
    assert_same(lm, fit(lm, tmp_path, method=method, facts_per_round=1), expected_lm, expected)
    rest = fit(forgetful, None, method=method, facts_per_round=1, facts=FACTS[3:])  # its history starts empty
    assert not torch.equal(rest.rounds[-1][Place(2)].right, expected.rounds[-1][Place(2)].right)


@pytest.mark.parametrize("max_epochs", [ROUNDS, 100])
def test_a_run_stopped_after_every_round_and_after_its_end(uninterrupted, tmp_path: Path, max_epochs: int) -> None:
    for rounds in range(ROUNDS):
        stop(tmp_path, rounds)
    ids = set()
    for _ in range(2):  # the second time nothing is left to do
        lm = model()
        edit = fit(lm, tmp_path, max_epochs=max_epochs)
        assert_same(lm, edit, *uninterrupted)
        ids.add(edit.id)
    assert len(ids) == 1


def test_a_round_whose_end_fails_is_repeated(uninterrupted, tmp_path: Path) -> None:
    class FailAtTheEnd(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise Stopped

    with pytest.raises(Stopped):
        fit(model(), tmp_path, FailAtTheEnd())
    assert len(kept_rounds(tmp_path)) == 1
    lm = model()
    assert_same(lm, fit(lm, tmp_path), *uninterrupted)


def test_a_round_that_was_taken_back_is_not_kept(tmp_path: Path) -> None:
    class TakeBack(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            if trainer.current_epoch == 1:
                module.lm.weights.remove([module.edit.owner(1)])
                module.edit.rounds.pop()
                module.edit.facts_in_round.pop()
                trainer.should_stop = True

    edit = fit(model(), tmp_path, TakeBack())
    assert edit.facts_in_round == [2]
    assert len(kept_rounds(tmp_path)) == 1


def test_a_run_that_had_ended_early_ends_there_again(tmp_path: Path) -> None:
    class End(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    first, second = model(), model()
    ended = fit(first, tmp_path, End())
    assert ended.facts_in_round == [2, 2]
    assert_same(second, fit(second, tmp_path), first, ended)
    assert len(kept_rounds(tmp_path)) == 2


def test_keys_random_numbers_and_counts_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[dict[int, torch.Tensor]] = []
    restored: list[dict[int, torch.Tensor]] = []
    drawn: list[tuple[Any, ...]] = []

    class Draw(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            drawn.append((trainer.current_epoch, trainer.global_step, torch.rand(1).item()))
            keys.append(module.editor.round_keys)

    def restore(editor: ClosedFormEditor, state: Any) -> None:
        restore_as_ever(editor, state)
        restored.append(editor.round_keys)

    restore_as_ever = ClosedFormEditor.restore
    monkeypatch.setattr(ClosedFormEditor, "restore", restore)
    method = le.ENCORE(layers=(1, 2), values=VALUES, contexts=METHOD.contexts, lambda_=5.0)  # keeps past keys
    torch.manual_seed(1)
    fit(model(), tmp_path / "whole", Draw(), method=method)
    expected, drawn = drawn, []
    expected_keys, keys = keys, []
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        fit(model(), tmp_path / "parts", StopAfter(2), Draw(), method=method)
    torch.manual_seed(7)
    fit(model(), tmp_path / "parts", Draw(), method=method)
    assert drawn == expected and len(drawn) == ROUNDS
    assert len(restored) == 2
    for found, wanted in zip([*restored, keys[2]], expected_keys, strict=True):
        for layer in map(Place, METHOD.layers):
            assert torch.equal(found[layer], wanted[layer]) and found[layer].dtype == torch.float64
            assert found[layer].stride() == wanted[layer].stride()  # as a sum over them may hang on it


def test_loggers_and_validation_go_on(tmp_path: Path) -> None:
    def rows(version: int) -> list[dict[str, str]]:
        with (tmp_path / "lightning_logs" / f"version_{version}" / "metrics.csv").open() as file:
            return [
                {k: v for k, v in row.items() if v and not k.startswith("seconds/")} for row in csv.DictReader(file)
            ]

    logged = {"limit_val_batches": 1.0, "max_epochs": ROUNDS}
    fit(model(), None, logger=CSVLogger(tmp_path), **logged)
    with pytest.raises(Stopped):
        fit(model(), tmp_path / "run", StopAfter(1), logger=CSVLogger(tmp_path), **logged)
    fit(model(), tmp_path / "run", logger=CSVLogger(tmp_path), **logged)
    assert rows(1) + rows(2) == rows(0)
    assert {row["epoch"] for row in rows(1)} == {"0"} and {row["epoch"] for row in rows(2)} == {"1", "2"}


def test_the_model_may_carry_an_earlier_edit(tmp_path: Path) -> None:
    def edited(seed: int) -> le.LanguageModel:
        lm = model()
        update = 0.01 * torch.randn(lm.weight(Place(0)).shape[0], 1, generator=torch.Generator().manual_seed(seed))
        lm.weights.add(("earlier", 0), Place(0), LowRankUpdate(update, torch.ones(lm.weight(Place(0)).shape[1], 1)))
        return lm

    expected_lm, lm = edited(1), edited(1)
    expected = fit(expected_lm, None)
    stop(tmp_path, 1, edited(1))
    with pytest.raises(le.ResumeError, match="differs in weights;"):
        fit(edited(2), tmp_path)
    assert_same(lm, fit(lm, tmp_path), expected_lm, expected)


# What cannot go on, says so


def refused(folder: Path, *texts: str, lm: le.LanguageModel | None = None, **changes: Any) -> None:
    lm = lm or model()
    before = weights(lm)
    with pytest.raises(le.ResumeError) as error:
        fit(lm, folder, **changes)
    for text in texts:
        assert text in str(error.value)
    assert not lm.weights.owners
    assert all(torch.equal(lm.model.get_parameter(name), parameter) for name, parameter in before.items())


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (["method.lambda_ (5.0 there, 6.0 now)"], {"method": replace(METHOD, lambda_=6.0)}),
        (["method.values.lr"], {"method": replace(METHOD, values=replace(VALUES, lr=0.1))}),
        (["facts;"], {"facts": [replace(FACTS[0], target_new="Madrid"), *FACTS[1:]]}),
        (["facts;"], {"facts": [*FACTS[:2], FACTS[3], FACTS[2], FACTS[4]]}),
        (["facts_per_round (2 there, 1 now)"], {"facts_per_round": 1}),
        (["facts_per_chunk (32 there, 1 now)"], {"facts_per_chunk": 1}),
        (["covariance tensors;"], {"covariance": covariance_of(model(), seed=5)}),
        (["model", "weights", "covariance.fingerprint"], {"lm": model(seed=1)}),
        (["model", "weights"], {"lm": model("gpt2")}),
        (["dtype ('float32' there, 'bfloat16' now)"], {"lm": model(dtype=torch.bfloat16)}),
    ],
)
def test_the_folder_of_another_run(tmp_path: Path, names: list[str], changes: dict[str, Any]) -> None:
    stop(tmp_path, 1)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    refused(tmp_path, str(tmp_path), *names, "--restart", **changes)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_another_number_of_threads(tmp_path: Path) -> None:
    stop(tmp_path, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        refused(tmp_path, f"threads ({threads} there, {threads + 1} now)")
    finally:
        torch.set_num_threads(threads)


def test_a_folder_without_a_finished_round_is_no_hindrance(tmp_path: Path) -> None:
    stop(tmp_path, 0)
    fit(model(), tmp_path, method=replace(METHOD, lambda_=6.0))
    assert len(kept_rounds(tmp_path)) == ROUNDS


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_in_the_tensors(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def change_the_record(file: Path) -> None:
    content = file.read_bytes()
    changed = content.replace(b'\\"facts\\": 2', b'\\"facts\\": 3')
    assert changed != content
    file.write_bytes(changed)


def swap_for_the_first(file: Path) -> None:
    shutil.copy(file.with_name("round-0001.safetensors"), file)


@pytest.mark.parametrize("damage", [cut, empty, flip_in_the_tensors, change_the_record, swap_for_the_first])
def test_a_damaged_round(uninterrupted, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    stop(tmp_path, 2)
    file = tmp_path / "round-0002.safetensors"
    damage(file)
    refused(tmp_path, str(file), "delete it and the rounds after it")
    file.unlink()  # the way out that the message names
    lm = model()
    assert_same(lm, fit(lm, tmp_path), *uninterrupted)


def test_a_round_of_another_run(tmp_path: Path) -> None:
    stop(tmp_path / "one", 2)
    stop(tmp_path / "two", 1)
    shutil.copy(tmp_path / "one" / "round-0002.safetensors", tmp_path / "two")
    refused(tmp_path / "two", "round-0002.safetensors", "round 2 of run")


def test_a_missing_round(tmp_path: Path) -> None:
    stop(tmp_path, 2)
    (tmp_path / "round-0001.safetensors").unlink()
    refused(tmp_path, "round-0001.safetensors is missing", "round-0002.safetensors")


def forget_the_id(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id": None}))


def another_format(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 7}))


@pytest.mark.parametrize("damage", [Path.unlink, cut, empty, forget_the_id, another_format])
def test_a_damaged_run(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    stop(tmp_path, 1)
    if damage is cut:
        cut(tmp_path / "run.json")  # the last newline
    damage(tmp_path / "run.json")
    refused(tmp_path, str(tmp_path / "run.json"), "--restart")


def test_what_a_kill_leaves_half_written_does_not_matter(uninterrupted, tmp_path: Path) -> None:
    stop(tmp_path, 1)
    (tmp_path / ".round-0002.safetensors.tmp").write_bytes(b"half")
    (tmp_path / ".run.json.tmp").write_bytes(b"{")
    lm = model()
    assert_same(lm, fit(lm, tmp_path), *uninterrupted)
    assert not (tmp_path / ".round-0002.safetensors.tmp").exists()


def test_two_processes_at_one_run(tmp_path: Path) -> None:
    stop(tmp_path, 1)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    refused(tmp_path, "another process", str(tmp_path))
    os.close(other)
    fit(model(), tmp_path)


# `edit` and the command line


def run(lm: le.LanguageModel, folder: Path | None) -> le.Edit:
    settings = le.RunSettings(facts_per_round=2, progress_bar=False)
    return le.edit(lm, FACTS, METHOD, covariance=covariance_of(lm), settings=settings, checkpoint=folder)


# Three solves compare the keys of the three rounds' facts; then there is one a layer, two a round
@pytest.mark.parametrize(("solves", "rounds"), [(1, 0), (4, 0), (7, 1)])
def test_edit_goes_on_after_ctrl_c(
    uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solves: int, rounds: int
) -> None:
    solve, calls = Preservation.solve, []

    def interrupt(self, keys):
        calls.append(keys)
        if len(calls) == solves:
            raise KeyboardInterrupt
        return solve(self, keys)

    lm, handler = model(), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Preservation, "solve", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(lm, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(kept_rounds(tmp_path)) == rounds
    assert not lm.weights.owners  # the caller keeps the unedited model
    assert_same(lm, run(lm, tmp_path), *uninterrupted)


_processes = multiprocessing.get_context("forkserver")
if not torch.cuda.is_available():  # importing lightedit looks at the GPUs, which no process can use after such a fork
    _processes.set_forkserver_preload(["tests.editing.test_checkpoint"])


def run_and_save(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    lm = model()
    method = replace(METHOD, values=replace(VALUES, steps=10, loss_threshold=0.0))
    settings = le.RunSettings(facts_per_round=1, progress_bar=False)
    edit = le.edit(lm, FACTS, method, covariance=covariance_of(lm), settings=settings, checkpoint=folder)
    edit.save(out / "edit")
    torch.save(weights(lm), out / "weights.pt")


def start(work: Callable[..., None], *arguments: Any) -> Any:
    process = _processes.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def until(seen: Callable[[], bool], process: Any) -> None:
    while process.is_alive() and not seen():
        pass


def at_any_moment(process: Any, folder: Path, seconds: float) -> None:
    process.join(random.uniform(0, 0.8 * seconds))


def after_a_round(process: Any, folder: Path, seconds: float) -> None:
    before = len(kept_rounds(folder))
    until(lambda: len(kept_rounds(folder)) > before, process)


def while_it_writes(process: Any, folder: Path, seconds: float) -> None:
    before = len(kept_rounds(folder))
    until(lambda: any(folder.glob(".round-*.tmp")) or len(kept_rounds(folder)) > before + 1, process)


def assert_killed_runs_end_alike(tmp_path: Path, moments: list[Callable[[Any, Path, float], None]]) -> int:
    """Kill a run at each of the moments and let it go on; the number of kills that came before its end."""
    start(time.sleep, 0).join(600)  # so that no time of importing is counted
    folder, kills = tmp_path / "killed.run", 0

    def finish(folder: Path, out: Path) -> float:
        out.mkdir()
        started = time.monotonic()
        process = start(run_and_save, folder, out)
        process.join(600)
        assert process.exitcode == 0
        return time.monotonic() - started

    seconds = finish(tmp_path / "whole.run", tmp_path / "whole")
    for moment in moments:
        with tempfile.TemporaryDirectory() as out:
            process = start(run_and_save, folder, Path(out))
            moment(process, folder, seconds)
            process.kill()
            process.join(600)
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
    finish(folder, tmp_path / "killed")
    edit, expected = (le.Edit.load(tmp_path / name / "edit") for name in ("killed", "whole"))
    assert_same_edit(edit, expected)
    found, wanted = (torch.load(tmp_path / name / "weights.pt") for name in ("killed", "whole"))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    return kills


def test_a_process_killed_three_times(tmp_path: Path) -> None:
    assert assert_killed_runs_end_alike(tmp_path, [after_a_round, while_it_writes, at_any_moment]) >= 2


@pytest.mark.slow
def test_a_process_killed_ten_times(tmp_path: Path) -> None:
    random.seed()
    assert assert_killed_runs_end_alike(tmp_path, [*[at_any_moment, while_it_writes] * 5]) >= 3


def command(arguments: list[str], errors: Path) -> None:
    torch.set_num_threads(1)
    sys.stderr = errors.open("a", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background of a shell inherit ignored
    main(arguments)


def test_the_command_goes_on_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer("bytelevel").save_pretrained("model")
    le.write_facts("facts.jsonl", FACTS)
    covariance_of(le.LanguageModel.load("model")).save("stats")
    arguments = ["edit", "--lm", str(tmp_path / "model"), "--facts", str(tmp_path / "facts.jsonl"),
                 "--covariance", str(tmp_path / "stats"), "--run.facts_per_round", "1",
                 "--method", "MEMIT", "--method.layers", "[1,2]", "--method.values.steps", "40"]  # fmt: skip
    errors = tmp_path / "errors"
    edits = {}
    for name in ("whole", "parts"):
        out = tmp_path / "edits" / name
        run_folder = out.with_name(f"{name}.run")
        process = start(command, [*arguments, "--out", str(out)], errors)
        if name == "parts":
            until(lambda folder=run_folder: len(kept_rounds(folder)) >= 1, process)
            os.kill(process.pid, signal.SIGINT)
            process.join(600)
            assert process.exitcode == 130, errors.read_text()
            assert "interrupted; the same command goes on after the rounds" in errors.read_text()
            assert not out.exists() and len(kept_rounds(run_folder)) >= 1
            process = start(command, [*arguments, "--out", str(out)], errors)
        process.join(600)
        assert process.exitcode == 3, errors.read_text()  # saved, but facts do not hold in a random model
        assert not run_folder.exists()
        edits[name] = le.Edit.load(out)
    assert "continuing after round" in errors.read_text()
    assert_same_edit(edits["parts"], edits["whole"])
    for name in ("before", "after", "outcomes", "damage"):
        assert getattr(edits["parts"], name) == getattr(edits["whole"], name)
    assert edits["parts"].before != edits["parts"].after


def test_the_command_throws_a_run_away_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer("bytelevel").save_pretrained("model")
    le.write_facts("facts.jsonl", FACTS)
    lm = le.LanguageModel.load("model")
    covariance_of(lm).save("stats")
    stop(Path("edits/x.run"), 1, lm)
    arguments = ["edit", "--lm", "model", "--facts", "facts.jsonl", "--covariance", "stats", "--method", "MEMIT",
                 "--method.layers", "[1,2]", "--method.values.steps", "4", "--evaluate", "false",
                 "--run.outcomes", "false", "--out", "edits/x"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(arguments)
    assert "holds another run" in capsys.readouterr().err
    main([*arguments, "--restart", "true"])
    assert le.Edit.load("edits/x").facts_in_round == [len(FACTS)]
    assert not Path("edits/x.run").exists()
