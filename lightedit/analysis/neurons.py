"""Knowledge neurons: which neurons express a fact in a model."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightedit.analysis.found_neurons import FactNeurons, Neuron, Neurons
from lightedit.analysis.neuron_settings import NeuronSettings
from lightedit.analysis.prompts import answer_of
from lightedit.analysis.tracing import tokens_of_a_pass
from lightedit.data.fact import Fact, FactError
from lightedit.data.prompts import Contexts
from lightedit.data.words import counted
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.methods.neurons.asking import AskedFact, ask, most_probable, texts_of
from lightedit.methods.neurons.common import common_neurons
from lightedit.methods.neurons.search import find_neurons
from lightedit.progress import progress
from lightedit.runs.kept import KeptRecords, kept_records
from lightedit.runs.provenance import computing, fingerprint_inputs


def neurons(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    settings: NeuronSettings | None = None,
    checkpoint: str | Path | None = None,
) -> Neurons:
    """Find, for each fact, the neurons that express it (Dai et al., 2022, arXiv 2104.08696).

        found = neurons(lm, read_facts("known_facts.json", limit=100))
        found.save("neurons/known")

    A neuron is an input of the MLP's second matrix of a layer at the token that predicts the answer. Integrated
    gradients attribute the answer's probability to the neurons of all layers. A fact's neurons have a large attribution
    in most of its prompts; see `NeuronSearch`.

    Answers are `target_true`, or `target_new` where a fact has no true target. Facts that the model does not know are
    left out, with a message on standard error; see `NeuronSettings.only_known`.

    Args:
        lm: the language model, with its present weights.
        facts: the facts.
        settings: how neurons are found.
        checkpoint: a folder of this run only, in which finished facts are stored. After an interruption, the same call
            resumes from them. Delete it once the result is saved.

    Raises:
        FactError: there are no facts, none that the model knows, or one that cannot be tokenised.
        ArgumentError: the model does not have the layers.
        UnsupportedModelError: a fact is served in the chat template, and there is none; or a place carries an adaptor.
        NumericalError: an attribution is not finite.
        ResumeError: `checkpoint` holds another run or a damaged file, or another process uses it.
    """
    check_model(lm)
    settings = settings or NeuronSettings()
    layers = settings.searched(lm)
    asked = _asked(lm, facts, settings)
    chosen, left_out = _known(lm, facts, asked, settings)
    if left_out:
        shown = ", ".join(map(repr, left_out[:2])) + (", ..." if len(left_out) > 2 else "")
        print(f"{len(chosen)} of {len(facts)} facts are searched; {lm.name} does not know the others: {shown}",
              file=sys.stderr)  # fmt: skip
    with ExitStack() as stack:
        kept: KeptRecords | None = None
        if checkpoint is not None:
            kept = stack.enter_context(kept_records(Path(checkpoint), "neurons", _inputs(lm, facts, settings)))
        found = {} if kept is None else {i: FactNeurons.from_dict(record) for i, record in kept.records.items()}
        rest = [index for index in chosen if index not in found]
        report = stack.enter_context(progress(f"searching {counted(len(chosen))}", settings.progress_bar))
        for number, index in enumerate(rest, start=1):
            found[index] = _search_one(lm, facts[index], asked[index], layers, settings)
            if kept is not None:
                kept.add(index, found[index].to_dict())
            report(number, len(rest))
    own = _refined([facts[index] for index in chosen], [found[index] for index in chosen], settings.search.common)
    return Neurons(lm.name, layers, settings, own, tuple(left_out))


def _refined(facts: Sequence[Fact], found: Sequence[FactNeurons], largest: float | None) -> tuple[FactNeurons, ...]:
    """What was found of each fact, without neurons that too many facts of its relation have."""
    if largest is None:
        return tuple(found)
    own = [{(neuron.layer, neuron.neuron) for neuron in each.neurons} for each in found]
    common = common_neurons(own, [fact.relation for fact in facts], largest)
    return tuple(
        replace(each, neurons=tuple(x for x in each.neurons if (x.layer, x.neuron) not in dropped))
        for each, dropped in zip(found, common, strict=True)
    )


def _asked(lm: LanguageModel, facts: Sequence[Fact], settings: NeuronSettings) -> list[AskedFact]:
    """The prompts and answers of each fact.

    Raises:
        FactError: there are no facts, or one cannot be tokenised; the message says which, from 0.
    """
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact")
    prompts = "prompt" if settings.published else settings.search.prompts
    contexts = settings.search.contexts.sample(lm) if prompts == "contexts" else Contexts()
    asked = []
    for number, fact in enumerate(facts):
        try:
            asked.append(ask(lm, fact, texts_of(fact, prompts, contexts), answer_of(fact), settings.published))
        except FactError as error:
            raise FactError(f"fact {number}: {error}") from error
    return asked


def _known(
    lm: LanguageModel, facts: Sequence[Fact], asked: Sequence[AskedFact], settings: NeuronSettings
) -> tuple[list[int], list[str]]:
    """Indices of the facts that are searched, and texts of those that are left out."""
    chosen, left_out = [], []
    for index, (fact, own) in enumerate(zip(facts, asked, strict=True)):
        if settings.only_known and most_probable(lm, own.prompts[0]) != own.answers[0][0]:
            left_out.append(fact.text)
        else:
            chosen.append(index)
    if not chosen:
        raise FactError(
            f"facts: none of the {len(facts)} is known to the model, so there is nothing to find; give facts that it "
            "knows, or search all of them (only_known=False)"
        )
    return chosen, left_out


def _inputs(lm: LanguageModel, facts: Sequence[Fact], settings: NeuronSettings) -> dict[str, Any]:
    """What determines the result."""
    kept = {name: value for name, value in asdict(settings).items() if name not in ("progress_bar", "tokens_per_pass")}
    return {**fingerprint_inputs(lm, facts), **computing(lm), "settings": kept}


def _search_one(
    lm: LanguageModel, fact: Fact, asked: AskedFact, layers: Sequence[int], settings: NeuronSettings
) -> FactNeurons:
    size = settings.tokens_per_pass or tokens_of_a_pass(lm)
    found = find_neurons(lm, asked, layers, settings.search, published=settings.published, max_tokens=size)
    rows = zip(found.neurons.tolist(), found.attributions.tolist(), found.shares.tolist(), strict=True)
    own = [Neuron(layer, index, value, share) for (layer, index), value, share in rows]
    own.sort(key=lambda neuron: -neuron.attribution)
    answer = lm.continuation(asked.prompts[0], asked.answers[0])
    return FactNeurons(
        fact.text, answer, found.probability, len(asked.prompts), found.share, tuple(own), found.by_layer
    )
