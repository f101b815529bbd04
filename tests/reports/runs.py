"""Runs to report on, saved as `lightedit edit` saves them, with scores drawn at random instead of from a model."""

from dataclasses import replace
from pathlib import Path

import torch

from lightedit.data.facts import Fact
from lightedit.editing.artefact import Edit
from lightedit.editing.retention import RetentionScores
from lightedit.evaluation.evaluate import Evaluation, summarize
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.metrics import Generations, PromptScores, RecordScores
from lightedit.runs.provenance import RunRecord

MARKUP = "<script>alert(1)</script>"
ROUNDS, EACH = 4, 5
FACTS = [
    Fact(
        "The mother tongue of {} is",
        f"person {number}",
        "English",
        target_true="French",
        paraphrase_prompts=(f"person {number}, a native speaker of", f"A text. person {number} spoke"),
        neighborhood_prompts=tuple(f"The mother tongue of neighbour {number}-{other} is" for other in range(10)),
        id=str(number),
    )
    for number in range(ROUNDS * EACH)
]
# What a page must survive, among ordinary facts: markup, quotes, an entity, right to left, one long word
FACTS[0] = replace(FACTS[0], subject=MARKUP, paraphrase_prompts=(f"\"{MARKUP}' speaks", "a & b &amp; c"))
FACTS[1] = replace(FACTS[1], prompt="شفته {} هي", subject="الملك", target_new="العربية", target_true="עברית")
FACTS[2] = replace(FACTS[2], subject="w" * 200, target_new="</title><img src=x onerror=alert(1)>")
CONTINUATION = f" {MARKUP} & so on"


def records(facts: list[Fact], quality: float, seed: int = 0) -> list[RecordScores]:
    """Scores at random, of which more are won with a higher `quality`; with what the model wrote."""
    draw = torch.Generator().manual_seed(seed)

    def scores(count: int, quality: float) -> PromptScores | None:
        if not count:
            return None
        wanted = 4 * torch.rand(count, generator=draw)
        other = (wanted + quality + torch.randn(count, generator=draw)).clamp(min=0.01)
        return PromptScores(wanted, other, (wanted < 0.5).double())

    return [
        RecordScores(
            scores(1, quality),
            scores(len(fact.paraphrase_prompts), quality),
            scores(len(fact.neighborhood_prompts), 0.5),
            Generations((f"{fact.text} {CONTINUATION} of the city",), CONTINUATION, fact.target_new),
        )
        for fact in facts
    ]


def evaluation(quality: float = 1.0, seed: int = 0, facts: list[Fact] = FACTS) -> Evaluation:
    return summarize(facts, records(facts, quality, seed))


def save_run(folder: Path, quality: float = 3.0, method: str = "MEMIT", rounds: int = ROUNDS) -> Path:
    """A run of several rounds, with evaluations before and after, retention and health."""
    retention = []
    for now in range(1, rounds + 1):
        scores = RetentionScores()
        for origin in range(1, now + 1):
            own = FACTS[(origin - 1) * EACH : origin * EACH]
            scores.update(origin, records(own, quality - 0.5 * (now - origin), seed=now))
        retention += scores.rows(now)
    health = [
        {
            "round": now,
            "facts": EACH * now,
            "kl": 0.001 * 4**now,
            "perplexity": 20.0 + now,
            "perplexity_ratio": 1 + now / 20,
            "drift": 1.5 * now**0.5,
            "weight_norm/layer_1": 30.0,
            "update_norm/layer_1": 1.5,
        }
        for now in range(1, rounds + 1)
    ]
    torch.manual_seed(0)
    before, after = evaluation(-2.0), evaluation(quality, seed=1)
    edit = Edit(
        "tiny",
        "92608895c307eeb1",
        RunRecord(
            {"name": method, "layers": [1, 2], "lambda_": 1000.0 * quality, "values": {"lr": 0.5}},
            {"contexts": {"templates": ["{}", f"{MARKUP} {{}}", "The river rises in the hills, and. {}"]}},
            seconds={"values": 12.5, "update": 0.25},
        ),
        facts=FACTS[: rounds * EACH],
        rounds=[
            {Place(layer): LowRankUpdate(torch.randn(8, EACH), torch.randn(20, EACH)) for layer in (1, 2)}
            for _ in range(rounds)
        ],
        facts_in_round=[EACH] * rounds,
        before=before,
        after=after,
        tables={"retention": retention, "health": health},
    )
    return edit.save(folder)
