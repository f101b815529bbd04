"""`lightedit facts`: a fact base on the command line."""

from pathlib import Path

import lightedit as le
from lightedit.commands.shared import covariance_of, read_served, say_saved
from lightedit.data.facts import FactError
from lightedit.data.words import counted
from lightedit.editing.summary import count_held
from lightedit.editing.tuning import tuned_method
from lightedit.errors import ArgumentError, RunFailedError

_RUN = le.RunSettings()
_WRITE = "write them into a model with: lightedit facts apply --base"


def add(
    base: Path,
    facts: Path,
    format: str | None = None,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
) -> None:
    """Add the facts of a file to a fact base; a new one is created.

    Args:
        base: folder of the fact base.
        facts: a file of facts: JSON, JSON lines, CSV or YAML, in this package's form or that of a published data set.
        format: form of the records in that file, such as fact, counterfact, zsre or easyedit; by default it is
            recognised.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let targets include the token that ends the turn, so that generation stops after them.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
    """
    opened = le.FactBase(base)
    before = len(opened)
    opened.add(read_served(facts, None, format, chat=chat, end_turn=end_turn, separator=separator))
    print(f"added {counted(len(opened) - before)}, {len(opened)} now; {_WRITE} {base}")


def replace(base: Path, fact: str, target: str | None = None, by: Path | None = None) -> None:
    """Replace a fact of a fact base, or its target.

    Args:
        base: folder of the fact base.
        fact: the fact's text: its prompt with the subject, as `lightedit facts list` shows it.
        target: the new target of the same fact.
        by: a file that holds the one fact to put in its place.
    """
    if (target is None) == (by is None):
        raise ArgumentError("give either --target or --by")
    new: str | le.Fact | None = target
    if by is not None:
        found = le.read_facts(by)
        if len(found) != 1:
            raise FactError(f"{by} holds {len(found)} facts; give a file of the one that takes the place of {fact!r}")
        new = found[0]
    assert new is not None
    opened = le.FactBase(base)
    opened.replace(fact, new)
    print(f"replaced {fact!r}; {_WRITE} {base}")


def remove(base: Path, fact: str) -> None:
    """Remove a fact from a fact base.

    Args:
        base: folder of the fact base.
        fact: the fact's text: its prompt with the subject, as `lightedit facts list` shows it.
    """
    opened = le.FactBase(base)
    opened.remove(fact)
    print(f"removed {fact!r}, {counted(len(opened))} now; {_WRITE} {base}")


def show(base: Path) -> None:
    """List the facts of a fact base, and whether each holds in the model that was edited last.

    Args:
        base: folder of the fact base.
    """
    opened = le.FactBase(base)
    edit = opened.edit
    held = {} if edit is None else {outcome.fact: outcome.held for outcome in edit.outcomes}
    for fact in opened:
        state = {None: "not applied", True: "holds", False: "NOT HELD"}[held.get(fact)]
        print(f"{state:11}  {fact.text} -> {fact.target_new}")
    gone = [] if edit is None else [fact for fact in edit.facts if fact not in set(opened)]
    for fact in gone:
        print(f"{'removed':11}  {fact.text} -> {fact.target_new} (still in the edit)")
    print(f"{counted(len(opened))}" + (f"; the edit is in {base / 'edit'}" if edit is not None else ""))


def apply(
    base: Path,
    lm: str,
    method: le.Method | None = None,
    covariance: Path | None = None,
    run: le.RunSettings = _RUN,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Write all facts of a fact base into a language model, and save the edit in the base.

    Only values of facts that are new or changed are searched. Each is stored when it is found, so that the same command
    goes on after an interruption. The exit status is 3 if the edit is saved, but a fact does not hold.

    Args:
        base: folder of the fact base.
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        method: a method that writes facts together, with its settings; by default that of the last apply, or MEMIT as
            lightedit tune finds it for the model.
        covariance: a folder that `lightedit covariance` saved, or one of published .npz files; by default the
            covariance is estimated from self-generated text and kept in the cache.
        run: settings of chunks and collisions; facts_per_round stays out.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    opened = le.FactBase(base, method, settings=run)
    opened.check()
    model = le.LanguageModel.load(lm, dtype, device)
    chosen = opened.method or tuned_method(model)
    opened = le.FactBase(base, chosen, settings=run)
    opened.covariance = covariance_of(model, [chosen], covariance)
    edit = opened.apply(model)
    print(edit)
    say_saved(model, edit, base / "edit", "lightedit facts add --chat")
    if not edit.held:
        raise RunFailedError(f"the edit is saved, but {count_held(edit.outcomes)}")
