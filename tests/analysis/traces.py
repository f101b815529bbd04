"""A tiny model that knows some facts, and made-up traces; for tests."""

import torch

import lightedit as le
from lightedit.analysis.trace import FactTrace
from tests.models import tiny_model, tiny_tokenizer

KNOWN = [
    le.Fact("The capital of the {} is in", "river", "the"),
    le.Fact("{} is in", "The river", "the"),
    le.Fact("In the city {} was", "of the state", "the"),
]
UNKNOWN = le.Fact("The song of the {} was", "radio", "city")
LAYERS = 3


def knowing_model(facts: list[le.Fact] = KNOWN, layers: int = LAYERS, logit: float = 12.0) -> le.LanguageModel:
    """A tiny model that continues the prompts of these facts with " the", whose logit there is `logit`."""
    model = tiny_model("llama", layers=layers)
    lm = le.LanguageModel(model, tiny_tokenizer("bytelevel"))
    (answer,) = lm.encode([" the"])[0]
    with torch.no_grad():
        states = []
        for fact in facts:
            hidden = model.model(torch.tensor([lm.encode([fact.text])[0]])).last_hidden_state[0, -1]
            states.append(hidden)
        together = torch.stack(states)
        model.lm_head.weight[answer] = torch.linalg.lstsq(together, torch.full((len(facts),), logit)).solution
    return le.LanguageModel(model, tiny_tokenizer("bytelevel"))


def made_up(fact: str = "The Eiffel Tower is in", shift: float = 0.0, layers: int = 2) -> FactTrace:
    """A trace whose figures are chosen: the effect of token t at layer l is 0.1 t + 0.01 l + shift."""

    def restored(positions: range) -> dict[int, list[float]]:
        return {t: [0.1 + 0.1 * t + 0.01 * layer + shift for layer in range(layers)] for t in positions}

    classes = ("before subject", "first subject", "middle subject", "middle subject", "last subject", "first after")
    return FactTrace(
        fact,
        " Paris",
        ("The", "E", "iff", "el", "Tower", "is", "in"),
        (*classes, "last"),
        (1, 5),
        0.9,
        0.1,
        {
            **{kind: restored(range(7)) for kind in ("state", "mlp", "attention")},
            **{f"{part} severed": restored(range(4, 5)) for part in ("mlp", "attention")},
        },
    )


def made_up_trace(facts: int = 3) -> le.Trace:
    traced = tuple(made_up(f"fact {number} is in", 0.05 * number) for number in range(facts))
    return le.Trace("tiny", 2, 0.35, le.TraceSettings(window=2), traced, ("The song is",))
