"""The Lightning trainer that the package's functions use."""

from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment


def own_trainer(**settings: Any) -> Trainer:
    """A trainer that runs in this process alone, under any launcher, without a progress bar of its own.

    It runs on the CPU because modules hold nothing to move: the language model stays on its own devices.
    """
    return Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
