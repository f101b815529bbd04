"""The Lightning trainer that the package's functions use."""

from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment


def own_trainer(accelerator: str = "cpu", **settings: Any) -> Trainer:
    """A trainer that runs in this process alone, under any launcher, without a progress bar of its own.

    It runs on the CPU because most modules hold nothing to move: the language model stays on its own devices.

    Args:
        accelerator: where modules that hold their model run; "auto" for a GPU if there is one.
        settings: other arguments of the trainer.
    """
    return Trainer(
        accelerator=accelerator,
        devices=1,
        plugins=[LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
