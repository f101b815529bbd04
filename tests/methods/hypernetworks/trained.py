"""Hyper-networks on disk for tests: untrained ones, saved as if they were trained."""

from dataclasses import replace
from pathlib import Path

import lightedit as le
from lightedit.methods.hypernetworks.method import HyperNetworkMethod
from lightedit.methods.hypernetworks.saving import save_network


def saved(lm: le.LanguageModel, method: HyperNetworkMethod, folder: Path) -> HyperNetworkMethod:
    """The method with a network of its first weights, saved in `folder`."""
    network = method.new_network(lm)
    save_network(folder, lm, network, network.state_dict(), method.to_dict(), {}, [{"step": 0}])
    return replace(method, folder=str(folder))
