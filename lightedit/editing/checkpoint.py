"""Checkpoints of a run: every finished round is stored on disk, and the same run resumes after the last one."""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightedit.digests import digest
from lightedit.editing.journal import Round, RoundCallback
from lightedit.editing.module import EditModule
from lightedit.errors import ArgumentError
from lightedit.files import whole_file
from lightedit.lm.changes import load_changes, save_changes
from lightedit.ops import implementations
from lightedit.runs.folder import ResumeError, check_run, kept_rounds, locked, round_file, start_run


class RoundCheckpoint(RoundCallback, Checkpoint):
    """Stores every round of an `EditModule`'s fit in a folder. A fit starts after the rounds stored there.

    On the CPU of the same machine, a resumed fit gives the same bits as an uninterrupted one. On a GPU it may not, as
    some of torch's sums have no fixed order. A round that another callback took back is not stored. A fit that had
    ended early ends again at the same round.

        trainer = Trainer(callbacks=[RoundCheckpoint("edits/first.run")])
        trainer.fit(module, datamodule=data)  # killed, and started again

    Args:
        folder: a folder of this run only; it is created if it does not exist. Delete it once the edit is saved.

    Raises:
        ResumeError: when a fit starts, the folder holds another run, a file is damaged, or another process uses the
            folder. The model is then unchanged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = ExitStack()
        self._last: KeptRound | None = None

    def kept_rounds(self, trainer: Trainer, module: LightningModule) -> list[Round]:
        """Lock the folder, check that it holds this run, and read its rounds; a new folder starts a run."""
        module = cast(EditModule, module)
        assert module.edit is not None
        settings = _settings(module)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.close()
        self._lock.enter_context(locked(self.folder))
        self._last = None
        files = kept_rounds(self.folder)
        if not files:
            start_run(self.folder, module.edit.id, settings)
            return []
        module.edit.id = check_run(self.folder, settings)
        kept = [KeptRound.load(file, module.edit.id, number) for number, file in enumerate(files, 1)]
        self._last = kept[-1]
        return [one.round for one in kept]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the trainer's counters and torch's random state to those of the earlier process."""
        if (last := self._last) is None:
            return
        torch.set_rng_state(last.random)
        number, loop = last.round.number, trainer.fit_loop
        loop.epoch_progress.increment_by(number)
        # loggers count batches, global_step counts optimizer steps
        loop.epoch_loop.on_load_checkpoint(last.batches)
        loop.epoch_loop.manual_optimization.optim_step_progress.increment_by(last.steps)
        if last.ended:
            trainer.should_stop = True
        stopped = last.round.stopped
        ended = "" if stopped is None else f", where the run ended: {stopped}"
        rounds = len(cast(EditModule, pl_module).data().rounds)
        print(f"continuing after round {number} of {rounds}{ended}", file=sys.stderr)

    def on_round_end(self, trainer: Trainer, module: LightningModule, round_: Round) -> None:
        edit = cast(EditModule, module).edit
        assert edit is not None
        KeptRound(
            round_,
            run=edit.id,
            ended=trainer.should_stop,
            steps=trainer.global_step,
            batches=trainer.fit_loop.epoch_loop.on_save_checkpoint(),
            random=torch.get_rng_state(),
        ).save(self.folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lock.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._lock.close()


def _settings(module: EditModule) -> dict[str, Any]:
    """Everything that determines the run, under the names of arguments and settings, as JSON values."""
    data, editor = module.data(), module.editor
    settings = {
        # without the ids of edits that the model carries, because the digest of its weights is included
        **editor.run_inputs(),
        **vars(editor.settings),
        "facts_per_round": data.facts_per_round,
        "facts_per_chunk": data.facts_per_chunk,
        "threads": torch.get_num_threads(),
        "ops": implementations(),
    }
    for name in ("progress_bar", "validate_every", "outcomes"):  # they do not change what is written
        settings.pop(name, None)
    return cast(dict[str, Any], json.loads(json.dumps(settings)))


@dataclass(frozen=True)
class KeptRound:
    """The contents of a finished round's file: the round, and the state from which a process resumes after it.

    Attributes:
        round: the round.
        run: id of the run's edit.
        ended: whether the fit ended with this round.
        steps: optimizer steps of the run so far.
        batches: the trainer's count of batches.
        random: state of torch's CPU random number generator after the round.
    """

    round: Round
    run: str
    ended: bool
    steps: int
    batches: dict[str, int]
    random: Tensor

    def save(self, folder: Path) -> None:
        """Write the round's file into `folder`."""
        round_ = self.round
        tensors = {"random": self.random, **{f"state.{name}": tensor for name, tensor in round_.state.items()}}
        changed, settings = save_changes(round_.changes, "change.")
        tensors |= changed | {f"value.{index}": value for index, value in round_.values.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        record = {
            "number": round_.number,
            "facts": round_.facts,
            "seconds": round_.seconds,
            "stopped": round_.stopped,
            "tables": round_.tables,
            "losses": round_.losses,
            "notes": round_.notes,
            "changes": settings,
            "run": self.run,
            "ended": self.ended,
            "steps": self.steps,
            "batches": self.batches,
        }
        text = json.dumps(record)
        content = save_tensors(tensors, {"record": text, "sha256": digest(text, tensors)})
        with whole_file(round_file(folder, round_.number)) as unfinished:
            unfinished.write_bytes(content)

    @classmethod
    def load(cls, file: Path, run: str, number: int) -> Self:
        """Read round `number` of `run`, and check that its file is complete and unaltered.

        Raises:
            ResumeError: the file is damaged, or belongs to another run.
        """
        way_out = "delete it and the rounds after it to repeat them"
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                # copies, because views into the file may be unaligned, which changes sums' order
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            if metadata["sha256"] != digest(metadata["record"], tensors):
                raise ArgumentError("its checksum is wrong")
            record = json.loads(metadata["record"])
            own = {name: record.pop(name) for name in ("run", "ended", "steps", "batches")}
            changes = load_changes(tensors, record.pop("changes"), "change.")
        except (SafetensorError, ValueError, LookupError) as error:
            raise ResumeError(f"{file} is truncated or was altered ({error}); {way_out}") from error
        if (own["run"], record["number"]) != (run, number):
            raise ResumeError(
                f"{file} is round {record['number']} of run {own['run']}, not round {number} of {run}; {way_out}"
            )
        state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
        values = {int(name.removeprefix("value.")): t for name, t in tensors.items() if name.startswith("value.")}
        return cls(Round(**record, changes=changes, state=state, values=values), **own, random=tensors["random"])
