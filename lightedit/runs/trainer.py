"""The Lightning trainer behind the package's own functions."""

from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment


def own_trainer(**settings: Any) -> Trainer:
    """A trainer that runs in this process alone, whatever launcher surrounds it, and draws nothing by itself.

    Its module holds nothing to move: the language model stays where it is, on GPUs too.
    """
    return Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
