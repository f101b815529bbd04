"""Row "mend": a training step of MEND's network, against a loop over its edits with whole matrices."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.published.hypernetworks import Layer, MENDMatrix, Normaliser, Row, mend_step
from lightedit.data.builtin import builtin_facts
from lightedit.data.fact import Fact
from lightedit.lm import LanguageModel
from lightedit.methods import MEND
from lightedit.methods.hypernetworks.examples import Drawn, EditorDataModule, EditorTrainingSettings, examples_of
from lightedit.methods.hypernetworks.mend_network import MENDNetwork
from lightedit.methods.hypernetworks.module import HyperNetworkModule

TOLERANCE = 1e-3  # of the norm of a parameter's gradient, and of the loss
_METHOD = MEND(layers=(27, 28, 29), rank=256)
_BATCH = 10


def row(options: Options) -> Result:
    """Measure the built-in model on the CPU in float32, on built-in facts, edits of the size of published training."""
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run(lm, builtin_facts(), _METHOD, batch=2 if options.quick else _BATCH, steps=1 if options.quick else 3)


def run(lm: LanguageModel, facts: Sequence[Fact], method: MEND, batch: int, steps: int) -> Result:
    """Compute the loss and gradient of training steps by both.

    The loop takes one edit at a time, writes it as a whole matrix, and runs whole texts through the whole model, as the
    published code does. Both have the same network, edits and texts.

    Args:
        lm: the language model, on the CPU in float32 or float64.
        facts: more than `batch` facts.
        method: the method.
        batch: edits of a step.
        steps: steps that are measured.

    Raises:
        WrongResultError: the loss, or a parameter's gradient, differs by more than `TOLERANCE`.
    """
    data = EditorDataModule(examples_of(lm, _rephrased(facts)), EditorTrainingSettings(batch_size=batch, validation=1))
    module = HyperNetworkModule(lm, method, steps)
    network = module.network
    assert isinstance(network, MENDNetwork)
    network.observe(module.factors([example.own for example in data.training[:32]]))
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith(".u"):  # at 0, it would hide the gradient of v
            torch.nn.init.normal_(parameter, std=1e-3)
    network.eval()  # statistics stay as they are, so that both normalise alike
    seconds = {"ours": 0.0, "loop": 0.0}
    differences = []
    for number in range(steps):
        drawn = data.draws.step(number)
        started = time.perf_counter()
        loss, _ = module.losses(drawn)
        ours = torch.autograd.grad(loss, list(network.parameters()))
        seconds["ours"] += (time.perf_counter() - started) / steps
        started = time.perf_counter()
        expected, gradients = _loop(lm, network, drawn, method)
        seconds["loop"] += (time.perf_counter() - started) / steps
        differences.append(_difference(loss.detach(), expected, ours, gradients))
    worst = max(differences)
    if not worst <= TOLERANCE:
        raise WrongResultError(f"a loss or a gradient differs from the loop's by {worst:.1e} of its size")
    table = [
        (f"ours, s a step of {batch} edits", f"{seconds['ours']:.2f}"),
        ("loop over edits, s", f"{seconds['loop']:.2f}"),
        ("times as fast", f"{seconds['loop'] / seconds['ours']:.1f}"),
    ]
    figures = {**seconds, "ratio": seconds["loop"] / seconds["ours"], "batch": batch, "steps": steps,
               "difference": worst}  # fmt: skip
    notes = [
        "forward and backward of a step, without the optimizer; the loop runs whole texts through the model, three a "
        "fact and one of them twice, and writes each edit as whole matrices"
    ]
    return Result(table, figures, notes)


def _rephrased(facts: Sequence[Fact]) -> list[Fact]:
    """Facts, each with a rephrasing and a text to leave alone."""
    return [
        replace(
            fact,
            paraphrase_prompts=fact.paraphrase_prompts or (f"It is well known that {fact.text}",),
            target_true=fact.target_true or "unknown",
            neighborhood_prompts=fact.neighborhood_prompts or (f"A book about {facts[number - 1].subject} is",),
        )
        for number, fact in enumerate(facts)
    ]


def _loop(
    lm: LanguageModel, network: MENDNetwork, batch: Sequence[Drawn], method: MEND
) -> tuple[Tensor, Sequence[Tensor]]:
    parameters = list(network.parameters())
    loss, sums = torch.zeros(()), [torch.zeros_like(parameter) for parameter in parameters]
    matrices = matrices_of(lm, network)
    for drawn in batch:
        own, rephrasing = Row(*drawn.example.own), Row(*drawn.rephrasing)
        sign = 1 if method.published else -1
        each = mend_step(lm.model, own, rephrasing, drawn.locality[0], matrices, method.edit_weight, sign) / len(batch)
        for total, gradient in zip(sums, torch.autograd.grad(each, parameters), strict=True):
            total += gradient
        loss = loss + each.detach()
    return loss, sums


def _difference(loss: Tensor, expected: Tensor, ours: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
    """The largest relative difference of the loss and of all parameters' gradients."""
    each = [
        float((one - other).norm() / other.norm().clamp(min=1e-12)) for one, other in zip(ours, gradients, strict=True)
    ]
    return max([float((loss - expected).abs() / expected.abs()), *each])


def matrices_of(lm: LanguageModel, network: MENDNetwork) -> list[MENDMatrix]:
    """A network's matrices as the published loop takes them, with the network's own parameters."""
    found: list[MENDMatrix] = []
    numbers: dict[str, int] = {}
    norms: dict[str, Normaliser] = {}
    for matrix in network.matrices:
        shape = f"{matrix.d_out}x{matrix.d_in}"
        shared, number = network.networks[shape], numbers.get(shape, 0)
        numbers[shape] = number + 1
        layers = [Layer(one.u, one.v, one.bias, one.scale[number], one.offset[number]) for one in shared.layers]
        norm = norms.setdefault(shape, Normaliser(int(shared.count), shared.mean.clone(), shared.squares.clone()))
        rate = network.rates[matrix.place.key]
        found.append(MENDMatrix(lm.module_name(matrix.place), rate, layers, norm if network.norm else None))
    return found
