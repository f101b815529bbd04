"""Row "values": step 1 for all facts together against the published loop, which takes one fact at a time."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.published import PublishedValue, published_values
from lightedit.data.builtin import builtin_facts
from lightedit.data.facts import Fact, read_facts
from lightedit.data.prompts import Contexts, ContextSettings, tokenize_facts
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.methods.closed_form.values import Site, TokenCount, ValueOptimization, Values
from lightedit.progress import progress

LAYER = 8
SITE: Site = "block"
TOLERANCE = 1e-4  # ||ours - reference|| / ||reference|| of a target
SQUARE = 2048  # side of the large product that also measures the machine's rate
_REPEATS = 9


def row(options: Options) -> Result:
    """Measure the built-in model on the CPU in float32, with MEMIT's contexts."""
    facts, source = load_facts(options.facts)
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    contexts = ContextSettings().sample(lm)
    return run(lm, facts, contexts, LAYER, ValueSettings(), options.reference_facts, [source])


def load_facts(count: int) -> tuple[list[Fact], str]:
    """The first `count` CounterFact records of the data folder, or built-in facts; and a note saying which.

    The folder is named by LIGHTEDIT_DATA, or else shared/data beside the repository. The built-in facts are about
    distinct countries, their relations taken in turn.

    Raises:
        ValueError: there are fewer facts.
    """
    named = os.environ.get("LIGHTEDIT_DATA")
    path = (Path(named) if named else Path(__file__).parents[2] / "shared" / "data") / "counterfact_1000.json"
    if path.is_file():
        facts, source = read_facts(path, limit=count), f"facts are the first {count} CounterFact records"
    else:
        countries: dict[str, list[Fact]] = {}
        for fact in builtin_facts():
            countries.setdefault(fact.subject, []).append(fact)
        facts = [relations[i % len(relations)] for i, relations in enumerate(countries.values())][:count]
        source = f"facts are {count} built-in ones, because {path.name} is missing; LIGHTEDIT_DATA names its folder"
    if len(facts) < count:
        raise ValueError(f"{count} facts asked, {len(facts)} found; lower --facts")
    return facts, source


def run(
    lm: LanguageModel,
    facts: Sequence[Fact],
    contexts: Contexts,
    layer: int,
    settings: ValueSettings,
    reference_facts: int | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Time both on `lm`: ours, the reference, ours again, so that a change of the machine's load shows.

    Args:
        lm: the language model, on the CPU in float32.
        facts: the facts.
        contexts: their contexts.
        layer: the edited block; the site is its output.
        settings: of the optimisation, the same for both.
        reference_facts: run the reference on the first so many facts; None runs it on all.
        notes: passed on to the result.

    Raises:
        WrongResultError: a target differs from the reference's by more than `TOLERANCE`.
    """
    rates = _matrix_rates(lm)
    first = search_values(lm, facts, contexts, layer, settings, "ours, before the reference")
    reference = _reference(lm, facts[:reference_facts], contexts, layer, settings, first.values.targets)
    second = search_values(lm, facts, contexts, layer, settings, "ours, after the reference")
    differences = [
        _check(fact, ours, published)
        for values in (first.values, second.values)
        for fact, ours, published in zip(facts, values.targets, reference.targets, strict=False)
    ]
    products, stock = products_seconds(lm, layer, first), stock_seconds(lm, layer, first)
    again = _matrix_rates(lm)
    rates = {size: max(rate, again[size]) for size, rate in rates.items()}
    notes = list(notes)
    if len(reference.targets) < len(facts):
        notes.append(
            f"a quick look: the reference ran on the first {len(reference.targets)} of {len(facts)} facts only; "
            "targets were compared for these, and the ratio sets its time per fact against ours over all facts"
        )
    return _result(lm, layer, first, second, reference, max(differences), rates, products, stock, notes)


@dataclass(frozen=True)
class Search:
    """One run of the search for values."""

    seconds: float
    values: Values
    tokens: TokenCount
    evaluations: int  # of single facts' losses
    head_reads: int  # positions where the LM head was needed, over all evaluations
    passes: int


@dataclass(frozen=True)
class _Reference:
    seconds: float
    targets: list[Tensor]  # [d] each
    steps: int


def search_values(
    lm: LanguageModel, facts: Sequence[Fact], contexts: Contexts, layer: int, settings: ValueSettings, name: str
) -> Search:
    """What `optimize_values` does, timed from the texts on."""
    with progress(name) as report:
        start = time.perf_counter()
        prompts = tokenize_facts(lm.tokenizer, facts, contexts)
        search = ValueOptimization(lm, prompts, layer, SITE, settings)
        optimizer = search.make_optimizer()
        evaluations = torch.zeros(len(facts), dtype=torch.long)
        while not search.done:
            evaluations += search.active
            search.backward()
            optimizer.step()
            search.after_step()
            report(float(search.progress.mean()), 1.0)
        values = search.values()
        seconds = time.perf_counter() - start
    reads = torch.tensor([sum(len(row.targets) for row in fact.rows) + 1 for fact in prompts])  # and the KL term's
    return Search(
        seconds, values, search.tokens, int(evaluations.sum()), int(evaluations @ reads), search.tokens.passes
    )


def _reference(
    lm: LanguageModel,
    facts: Sequence[Fact],
    contexts: Contexts,
    layer: int,
    settings: ValueSettings,
    expected: Tensor,
) -> _Reference:
    """The published loop over `facts`; it ends with the first target that `expected` [B, d] does not meet."""
    seconds, targets, steps = 0.0, [], 0
    with progress("reference, one fact at a time") as report:
        for done, (fact, ours) in enumerate(zip(facts, expected, strict=False), start=1):
            start = time.perf_counter()
            value = published_value(lm, fact, contexts, layer, SITE, settings)
            seconds += time.perf_counter() - start
            _check(fact, ours, value.target)
            targets.append(value.target)
            steps += value.steps_taken
            report(done, len(facts))
    return _Reference(seconds, targets, steps)


def published_value(
    lm: LanguageModel, fact: Fact, contexts: Contexts, layer: int, site: Site, settings: ValueSettings
) -> PublishedValue:
    """One fact's value by the published loop.

    Behind a norm after the MLP, most outputs of a block cannot be reached. delta is then added at the MLP's output, and
    the target is the block's output with it.
    """
    before_norm = site == "block" and lm.mlp_norm(layer) is not None
    return published_values(
        lm.model,
        lm.tokenizer,
        fact.prompt,
        fact.subject,
        fact.target_new,
        contexts.templates,
        layer,
        "mlp" if before_norm else site,
        lr=settings.lr,
        steps=settings.steps,
        clamp_norm_factor=settings.clamp_norm_factor,
        kl_factor=settings.kl_factor,
        weight_decay=settings.weight_decay,
        loss_threshold=settings.loss_threshold,
        target_of_block=before_norm,
        erase=settings.objective == "erase",
    )


def _check(fact: Fact, ours: Tensor, reference: Tensor) -> float:
    difference = float((ours - reference).norm() / reference.norm())
    if not difference <= TOLERANCE:  # NaN fails too
        raise WrongResultError(
            f"the target of {fact.text!r} -> {fact.target_new!r} is {difference:.1e} from the reference's, relative to "
            f"its norm; at most {TOLERANCE:.0e} is expected, so no speed is reported"
        )
    return difference


def _matrix_rates(lm: LanguageModel) -> dict[str, float]:
    """Median rate of float32 matrix products in flop/s, by size: one of the model's own and a large square one."""
    d, d_in = lm.weight(Place(0)).shape
    rates = {}
    for rows, inner, columns in ((1024, d, d_in), (SQUARE, SQUARE, SQUARE)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        seconds = _median_seconds(lambda a=left, b=right: a @ b)
        rates[f"[{rows}, {inner}] x [{inner}, {columns}]"] = 2 * rows * inner * columns / seconds
    return rates


def products_seconds(lm: LanguageModel, layer: int, ours: Search) -> float:
    """Seconds that our run's matrix products take by themselves: forward, and backward to the input, at its shapes."""
    blocks = [parameter for block in lm.blocks[layer + 1 :] for parameter in block.parameters() if parameter.ndim == 2]
    shapes = Counter(tuple(matrix.shape) for matrix in blocks)
    seconds = 0.0
    for shape, count, rows in [(shape, count, ours.tokens.real) for shape, count in shapes.items()] + [
        (tuple(lm.head.weight.shape), 1, ours.head_reads)
    ]:
        inputs, gradient = torch.randn(rows // ours.passes, shape[1]), torch.randn(rows // ours.passes, shape[0])
        weight = torch.randn(shape)
        both = [
            _median_seconds(lambda x=inputs, w=weight: x @ w.T),
            _median_seconds(lambda g=gradient, w=weight: g @ w),
        ]
        seconds += count * ours.passes * sum(both)
    return seconds


def stock_seconds(lm: LanguageModel, layer: int, ours: Search) -> float:
    """Seconds that the model's own blocks take for as many tokens, forward and backward to their input.

    Rows of 12 tokens in passes as large as ours, without prefixes, δ, head or loss: what is left of our time is ours,
    and what this takes beyond the products is the model's elementwise operations and attention.
    """
    rows, length = ours.tokens.real // ours.passes // 12, 12
    batch = pad([[lm.text_start] * length] * rows, lm.pad_id)
    gradient = torch.randn(rows, length, lm.d_model)
    at = torch.arange(rows).repeat_interleave(length), torch.arange(length).repeat(rows)

    def work() -> None:
        hidden = torch.randn(rows, length, lm.d_model, requires_grad=True)
        with lm.starting_at(layer + 1, hidden), lm.before_head(rows, at) as states:
            lm.forward(batch)
        states[0].backward(gradient.flatten(0, 1))

    return _median_seconds(work) * ours.passes * ours.tokens.real / (ours.passes * rows * length)


def _median_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _result(
    lm: LanguageModel,
    layer: int,
    first: Search,
    second: Search,
    reference: _Reference,
    difference: float,
    rates: dict[str, float],
    products: float,
    stock: float,
    notes: list[str],
) -> Result:
    count = len(first.values.targets)
    rate = max(rates.values())
    ours = median([first.seconds, second.seconds]) / count
    theirs = reference.seconds / len(reference.targets)
    ratios = [theirs / (run.seconds / count) for run in (first, second)]
    padding = 1 - first.tokens.real / first.tokens.computed
    # 2 flops a parameter and token forward, and 2 backward to the input; weights get no gradient
    matrices = sum(p.numel() for block in lm.blocks[layer + 1 :] for p in block.parameters() if p.ndim == 2)
    head = lm.model.get_output_embeddings().weight.numel()
    floor = 4 * matrices * first.tokens.real / rate / count
    floor_with_head = floor + 4 * head * first.head_reads / rate / count
    figures = {
        "facts": count,
        "reference_facts": len(reference.targets),
        "layer": layer,
        "site": SITE,
        "ours_seconds": [first.seconds, second.seconds],
        "reference_seconds": reference.seconds,
        "ours_seconds_per_fact": ours,
        "reference_seconds_per_fact": theirs,
        "ratio": theirs / ours,
        "ratios": ratios,  # of each of our two timings
        "largest_target_difference": difference,
        "steps_per_fact": float(first.values.steps.double().mean()),
        "reference_steps_per_fact": reference.steps / len(reference.targets),
        "evaluations": first.evaluations,
        "tokens_real": first.tokens.real,
        "tokens_computed": first.tokens.computed,
        "tokens_per_fact_and_evaluation": first.tokens.computed / first.evaluations,
        "padding": padding,
        "head_reads": first.head_reads,
        "matrix_rates": rates,
        "floor_seconds_per_fact": floor,
        "time_over_floor": ours / floor,
        "products_seconds_per_fact": products / count,
        "products_over_floor": products / count / floor,
        "stock_blocks_seconds_per_fact": stock / count,
        "stock_blocks_over_floor": stock / count / floor,
        "floor_with_head_seconds_per_fact": floor_with_head,
        "time_over_floor_with_head": ours / floor_with_head,
    }
    both = ", ".join(f"{run.seconds / count:.2f}" for run in (first, second))
    table = [
        ("ours, facts together", f"{ours:.2f} s/fact (before and after the reference: {both})"),
        ("reference, one fact at a time", f"{theirs:.2f} s/fact"),
        ("facts/s, ours over the reference", f"{theirs / ours:.2f} (by timing: {ratios[0]:.2f}, {ratios[1]:.2f})"),
        ("largest relative difference of a target", f"{difference:.1e}"),
        ("steps per fact", f"{figures['steps_per_fact']:.1f}"),
        ("tokens computed per fact and evaluation", f"{figures['tokens_per_fact_and_evaluation']:.1f}"),
        ("share of padding", f"{padding:.1%}"),
        *((f"matrix rate, {size}", f"{rate / 1e9:.0f} Gflop/s") for size, rate in rates.items()),
        ("floor: the blocks' arithmetic", f"{floor:.2f} s/fact"),
        ("time over the floor", f"{ours / floor:.2f}"),
        ("the products alone over the floor, head included", f"{products / count / floor:.2f}"),
        ("the stock model's blocks alone over the floor", f"{stock / count / floor:.2f}"),
        ("floor with the LM head's arithmetic", f"{floor_with_head:.2f} s/fact"),
        ("time over the floor with the head", f"{ours / floor_with_head:.2f}"),
    ]
    return Result(table, figures, notes)
