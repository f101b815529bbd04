"""The Lightning trainer that the package's functions use."""

from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment


def own_trainer(**settings: Any) -> Trainer:
    """A trainer that runs in this process alone, under any launcher, without a progress bar of its own.

    It runs on the CPU unless `settings` say otherwise, because most modules hold nothing to move: the language model
    stays on its own devices.
    """
    return Trainer(
        plugins=[LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "devices": 1, **settings},
    )
