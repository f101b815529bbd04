"""Hyper-networks on disk for tests: untrained ones, saved as if they were trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import lightedit as le
from lightedit.data.served import encode_targets
from lightedit.methods.hypernetworks.factors import Answered, token_factors
from lightedit.methods.hypernetworks.method import HyperNetworkMethod
from lightedit.methods.hypernetworks.saving import save_network
from tests.runs import FACTS

_FOLDERS = TemporaryDirectory()
_READY: dict[tuple[str, le.Method], le.Method] = {}


def rows_of(lm: le.LanguageModel, facts: list[le.Fact]) -> list[Answered]:
    pairs = encode_targets(lm.tokenizer, [fact.text for fact in facts], [fact.target_new for fact in facts])
    return [Answered(ids[:-1], ids[-count:]) for ids, count in pairs]


def saved(
    lm: le.LanguageModel,
    method: HyperNetworkMethod,
    folder: Path,
    change: Callable[[torch.nn.Module], None] = lambda network: None,
) -> HyperNetworkMethod:
    """The method with a network of its first weights and the statistics of `FACTS`, saved in `folder`."""
    network = method.new_network(lm)
    change(network)
    if network.fresh:
        network.observe(token_factors(lm, rows_of(lm, FACTS), method.places, network.dtype))
    save_network(folder, lm, network, network.state_dict(), method.to_dict(), {}, [{"step": 0}])
    return replace(method, folder=str(folder))


def ready(lm: le.LanguageModel, method: le.Method) -> le.Method:
    """The method, with a saved network for `lm` if it needs one and names layers that `lm` has."""
    if not isinstance(method, HyperNetworkMethod) or method.folder is not None or max(method.layers) >= lm.n_layers:
        return method
    key = (lm.fingerprint, method)
    if key not in _READY:
        _READY[key] = saved(lm, method, Path(_FOLDERS.name) / str(len(_READY)))
    return _READY[key]
