"""Row "grace": what a codebook of 1,000 entries adds to a forward pass, against the published lookup."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.published.adaptors import PublishedGRACE
from benchmarks.values import load_facts
from lightedit.data.facts import Fact
from lightedit.lm import LanguageModel, Place
from lightedit.methods.adaptors.codebook import Codebook

PLACE = Place(21, "mlp")
ENTRIES = 1000
REPEATS, QUICK_REPEATS = 15, 5
LIMIT = 0.1  # of the time of a forward pass
TOLERANCE = 1e-3  # of logits


def row(options: Options) -> Result:
    """Measure the built-in model on the CPU in float32; `--quick` repeats less."""
    facts, source = load_facts(options.facts)
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run(lm, facts, PLACE, QUICK_REPEATS if options.quick else REPEATS, [source])


def run(
    lm: LanguageModel,
    facts: Sequence[Fact],
    place: Place,
    repeats: int,
    notes: Sequence[str] = (),
    count: int = ENTRIES,
) -> Result:
    """Time forward passes of one batch of prompts: bare, with a codebook, and with the published lookup.

    The prompts are those of the most frequent number of tokens, because the published lookup takes one position as the
    query of all rows. Every second prompt has an entry at its own query, which fires; the other entries are random.
    Times are seconds of the processor, which other processes do not lengthen; the three ways take turns.

    Raises:
        WrongResultError: logits with the codebook differ from those with the published lookup.
    """
    rows = lm.encode([fact.text for fact in facts])
    length = Counter(map(len, rows)).most_common(1)[0][0]
    ids = torch.tensor([ids for ids in rows if len(ids) == length])
    book = _codebook(lm, ids, place, count)
    published = PublishedGRACE(keys=book.keys, values=book.values, radii=book.radii)
    owner = ("benchmark", 0)

    def ours() -> AbstractContextManager[None]:
        return nullcontext()

    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "bare": lm.weights.unedited, "ours": ours, "published": lambda: published.at(lm.module(place)),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    logits: dict[str, Tensor] = {}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            if name == "ours":
                lm.weights.add(owner, place, book)
            with way(), torch.no_grad():
                started = time.process_time()
                logits[name] = lm.model(input_ids=ids, use_cache=False).logits
                seconds[name].append(time.process_time() - started)
            if name == "ours":
                lm.weights.remove([owner])
    difference = float((logits["ours"] - logits["published"]).abs().max())
    changed = float((logits["ours"] - logits["bare"]).abs().max())
    if not (difference <= TOLERANCE < changed):
        raise WrongResultError(
            f"logits differ by {difference:.1e} from those with the published lookup, and by {changed:.1e} from those "
            "without an edit, so no speed is reported"
        )
    own = {name: median(each[1:]) for name, each in seconds.items()}  # the first pass warms up
    over = {name: median(a / b - 1 for a, b in zip(seconds[name][1:], seconds["bare"][1:], strict=True))
            for name in ("ours", "published")}  # fmt: skip
    table = [
        (f"forward pass of {len(ids)} prompts of {length} tokens, bare", f"{own['bare']:.3f} s"),
        (f"added by a codebook of {count} entries", f"{over['ours']:+.1%} (limit {LIMIT:.0%})"),
        ("added by the published lookup", f"{over['published']:+.1%}"),
        ("largest difference of their logits", f"{difference:.1e}"),
    ]
    figures = {"prompts": len(ids), "tokens": length, "entries": count, "repeats": repeats, "cpu_seconds": own,
               "overhead": over, "limit": LIMIT, "difference": difference}  # fmt: skip
    return Result(table, figures, list(notes))


def _codebook(lm: LanguageModel, ids: Tensor, place: Place, count: int) -> Codebook:
    """Entries at every second prompt's query, then random ones of the queries' mean and spread."""
    last = torch.full((len(ids),), ids.shape[1] - 1)
    with torch.no_grad(), lm.capture([place], len(ids), (torch.arange(len(ids)), last), inputs=True) as seen:
        lm.model(input_ids=ids, use_cache=False)
    queries = seen[place].float()
    draws = torch.Generator().manual_seed(0)
    d_out, d_in = lm.anatomy.shape(place)
    mean, spread = queries.mean(0), queries.std(0, correction=0)
    keys = mean + (spread + spread.mean()) * torch.randn(count, d_in, generator=draws)
    own = queries[::2][:count]
    keys[: len(own)] = own
    values = torch.rand(count, d_out, generator=draws)
    radii = torch.full((count,), 1e-2 * float(torch.pdist(queries).median()))
    labels = torch.zeros(count, 1, dtype=torch.long)
    return Codebook(keys, values, radii, labels, torch.arange(count))
