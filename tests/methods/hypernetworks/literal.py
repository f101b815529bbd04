"""The package's networks as the literal published loops take them: the same parameters, under their own names."""

import lightedit as le
from benchmarks.published.hypernetworks import KEMatrix, Layer, MENDMatrix, Normaliser
from lightedit.methods.hypernetworks.ke_network import KENetwork
from lightedit.methods.hypernetworks.mend_network import MENDNetwork


def mend_matrices(lm: le.LanguageModel, network: MENDNetwork) -> list[MENDMatrix]:
    """MEND's matrices; the layers hold the network's own parameters, so that gradients reach them."""
    found, seen, norms = [], {}, {}
    for matrix in network.matrices:
        shape = f"{matrix.d_out}x{matrix.d_in}"
        shared, number = network.networks[shape], seen.setdefault(shape, 0)
        seen[shape] += 1
        layers = [Layer(one.u, one.v, one.bias, one.scale[number], one.offset[number]) for one in shared.layers]
        norm = norms.setdefault(shape, Normaliser(int(shared.count), shared.mean.clone(), shared.squares.clone()))
        norm = norm if network.norm else None
        found.append(MENDMatrix(lm.module_name(matrix.place), network.rates[matrix.place.key], layers, norm))
    return found


def ke_matrices(lm: le.LanguageModel, network: KENetwork) -> list[KEMatrix]:
    return [KEMatrix(lm.module_name(one.place), network.conditioners[one.place.key]) for one in network.matrices]
