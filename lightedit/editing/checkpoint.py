"""A run that outlives its process: every finished round is kept on disk, and the same run goes on after the last."""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightedit.data.modules import FactsDataModule
from lightedit.editing.module import EditModule
from lightedit.ops import implementations
from lightedit.runs.folder import Round, check_run, kept_rounds, locked, start_run
from lightedit.runs.provenance import determining


class RoundCheckpoint(Checkpoint):
    """Keeps every round of an `EditModule`'s fit in a folder, and starts a fit after the rounds that are there.

    A fit that goes on ends with the bits of one that was never stopped, given the same machine and the CPU; on a GPU
    some of torch's own sums have no fixed order. A round that another callback took back is not kept, and a fit that
    had ended by itself ends again at the same round.

        trainer = Trainer(callbacks=[RoundCheckpoint("edits/first.run")])
        trainer.fit(module, datamodule=data)  # killed, and started again

    Args:
        folder: of this run alone; it is made if need be. Delete it once the edit is saved.

    Raises:
        ResumeError: as a fit starts: the folder holds another run, a file is damaged, or another process is at work
            in the folder. The model is left as it was.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = ExitStack()
        self._kept = 0

    # By now the module has read contexts and keys from the unedited model, and other callbacks what they need of it:
    # checkpoint callbacks come last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(EditModule, pl_module)
        assert module.edit is not None
        data = cast(FactsDataModule, getattr(trainer, "datamodule"))  # noqa: B009
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.close()
        self._lock.enter_context(locked(self.folder))
        settings, files = _settings(module, data), kept_rounds(self.folder)
        self._kept = len(files)
        if not files:
            start_run(self.folder, module.edit.id, settings)
            return
        module.edit.id = check_run(self.folder, settings)
        try:
            for number, file in enumerate(files, 1):
                round_ = Round.load(file, module.edit.id, number)
                module.restore_round(round_.updates, round_.facts, round_.keys)
                for name, rows in round_.tables.items():
                    module.edit.tables.setdefault(name, []).extend(rows)
        except BaseException:
            if module.edit.is_applied(module.lm):
                module.edit.revert(module.lm)
            raise
        torch.set_rng_state(round_.random)
        if round_.stopped is not None:
            module.edit.provenance["stopped"] = round_.stopped
        module.seconds.update(round_.seconds)
        module.edit.provenance["seconds"] = dict(module.seconds)
        for name, count in round_.tokens.items():
            setattr(module.tokens, name, count)
        loop = trainer.fit_loop
        loop.epoch_progress.increment_by(len(files))
        # loggers count batches and users optimizer steps; both go on from where they were
        loop.epoch_loop.on_load_checkpoint(round_.batches)
        loop.epoch_loop.manual_optimization.optim_step_progress.increment_by(round_.steps)
        if round_.last:
            trainer.should_stop = True
        ended = "" if round_.stopped is None else f", where the run ended: {round_.stopped}"
        print(f"continuing after round {len(files)} of {len(data.rounds)}{ended}", file=sys.stderr)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(EditModule, pl_module)
        assert module.edit is not None
        if len(module.edit.rounds) == self._kept:
            return
        self._kept += 1
        round_ = Round(
            run=module.edit.id,
            number=self._kept,
            facts=module.edit.facts_in_round[-1],
            last=trainer.should_stop,
            seconds=dict(module.seconds),
            tokens=asdict(module.tokens),
            steps=trainer.global_step,
            batches=trainer.fit_loop.epoch_loop.on_save_checkpoint(),
            stopped=module.edit.provenance.get("stopped"),
            tables={
                name: [row for row in rows if row["round"] == self._kept] for name, rows in module.edit.tables.items()
            },
            updates=module.edit.rounds[-1],
            keys=module.round_keys if module.method.keeps_past_keys else {},  # the larger part of a file
            random=torch.get_rng_state(),
        )
        round_.save(self.folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lock.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._lock.close()


def _settings(module: EditModule, data: FactsDataModule) -> dict[str, Any]:
    """All that determines a run, under names that its user knows, as JSON gives it back."""
    assert module.edit is not None
    settings = {
        # not the names of edits that the model carries: its weights count
        **{name: value for name, value in module.edit.provenance.items() if name not in ("seconds", "on_top_of")},
        **determining(module.lm, module.method, module.covariance, data.facts),
        "facts_per_round": data.facts_per_round,
        "facts_per_chunk": data.facts_per_chunk,
        "on_collision": module.on_collision,
        "collision_similarity": module.collision_similarity,
        "max_tokens": module.max_tokens,
        "threads": torch.get_num_threads(),
        "ops": implementations(),
    }
    return cast(dict[str, Any], json.loads(json.dumps(settings)))
