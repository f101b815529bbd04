"""`lightedit demo`: edit facts that the built-in model knows, and show the scores before and after."""

import time
from dataclasses import replace
from pathlib import Path

from lightedit.data.builtin import builtin_facts
from lightedit.data.facts import Fact, FactError
from lightedit.editing.artefact import check_free
from lightedit.editing.run import edit
from lightedit.evaluation.evaluate import evaluate
from lightedit.lm import LanguageModel
from lightedit.methods import MEMIT
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.metrics import score_targets
from lightedit.progress import progress
from lightedit.statistics.estimation import estimate_covariance

# At a loss of 0.3 a target's probability is e^-0.3 = 74 %; lower losses mostly change neighbouring facts
METHOD = MEMIT(layers=(4, 5, 6, 7, 8), lambda_=600.0, values=ValueSettings(loss_threshold=0.3))


def demo(facts: int = 64, out: Path = Path("edits/demo")) -> None:
    """Edit facts about countries in a small language model and show the scores before and after.

    Args:
        facts: number of facts to edit.
        out: folder for the edit; an earlier edit in it is replaced.
    """
    started = time.monotonic()
    if facts < 1:
        raise FactError(f"facts: {facts} cannot be edited; give at least 1")
    check_free(out, overwrite=True)
    lm = LanguageModel.load("smollm2")
    chosen = known_facts(lm, facts)
    covariance = estimate_covariance(lm, METHOD, cache=True)
    before = evaluate(lm, chosen)
    result = edit(lm, chosen, METHOD, covariance=covariance)
    result.before, result.after = before, evaluate(lm, chosen)
    result.save(out, overwrite=True)

    print(f"\n{lm.name}: {len(chosen)} facts that it knew, edited with MEMIT in layers {list(METHOD.layers)}\n")
    print(result.after.table(before))
    print(f"\n{result}\n\nThe edit is in {out}. In Python, with lm = lightedit.LanguageModel.load('smollm2'):")
    print(f"  edit = lightedit.Edit.load('{out}'); edit.apply(lm); edit.revert(lm)")
    print(f"({time.monotonic() - started:.0f} s)")


def known_facts(lm: LanguageModel, count: int) -> list[Fact]:
    """Choose `count` built-in facts whose true target is `lm`'s most probable answer, taking relations in turn.

    There is one fact per country, because keys of facts about one subject would collide. Neighbourhood prompts that are
    edited here are left out.

    Raises:
        FactError: the model knows facts about fewer than `count` countries.
    """
    facts = builtin_facts()
    with progress("asking what the model knows") as report:
        scores = score_targets(
            lm,
            [fact.text for fact in facts],
            [fact.target_true or "" for fact in facts],
            report=report,
        )
    known = [fact for fact, share in zip(facts, scores.token_accuracy.tolist(), strict=True) if share == 1]
    relations = sorted({fact.relation for fact in known if fact.relation})
    queues = [[fact for fact in known if fact.relation == relation] for relation in relations]
    chosen: dict[str, Fact] = {}
    while len(chosen) < count and any(queues):
        for queue in queues:
            while queue and queue[0].subject in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                fact = queue.pop(0)
                chosen[str(fact.subject)] = fact
    if len(chosen) < count:
        raise FactError(f"{lm.name} knows built-in facts about {len(chosen)} countries, not {count}; ask for fewer")
    edited = {fact.text for fact in chosen.values()}
    return [
        replace(fact, neighborhood_prompts=tuple(p for p in fact.neighborhood_prompts if p not in edited))
        for fact in chosen.values()
    ]
