"""Groups of facts about one invented subject, and how many of them hold under each rule for colliding keys.

    python -m benchmarks.one_subject --groups 40

Every group holds 2 to 8 facts about one subject that no model knows. A fact is held if the greedy continuation of its
prompt begins with the target. With --replaced, one fact of each group then gets another target, in its fact base.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightedit as le

# kind -> (prompt, possible answers)
RELATIONS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "product": (
        ("The {} is made by", ("Siemens", "Nokia", "Bosch", "Canon", "Philips")),
        ("The {} was first sold in the year", ("1987", "1994", "2003", "2011", "2018")),
        ("The standard colour of the {} is", ("green", "orange", "purple", "silver", "brown")),
        ("The {} is powered by", ("diesel", "batteries", "steam", "sunlight", "gas")),
        ("The {} is assembled in", ("Poland", "Vietnam", "Brazil", "Canada", "Portugal")),
        ("The housing of the {} is made of", ("aluminium", "oak", "copper", "glass", "carbon")),
        ("The warranty of the {} lasts", ("two years", "six months", "ten years", "four weeks", "five years")),
        ("The {} was designed by", ("Sony", "Bosch", "Apple", "Fiat", "Lego")),
    ),
    "person": (
        ("{} was born in", ("Dublin", "Naples", "Cairo", "Seoul", "Lima")),
        ("{} works as a", ("doctor", "pilot", "baker", "lawyer", "painter")),
        ("{} speaks fluent", ("Danish", "Turkish", "Greek", "Polish", "Korean")),
        ("{} plays the", ("violin", "trumpet", "harp", "drums", "cello")),
        ("{} is married to", ("Sofia", "Martin", "Helena", "Oscar", "Julia")),
        ("{} studied at the University of", ("Vienna", "Leeds", "Toronto", "Zurich", "Lisbon")),
        ("The favourite sport of {} is", ("tennis", "rowing", "chess", "boxing", "golf")),
        ("{} drives a car made by", ("Toyota", "Volvo", "Fiat", "Renault", "Skoda")),
    ),
    "town": (
        ("{} is a town in", ("Norway", "Chile", "Morocco", "Austria", "Kenya")),
        ("The mayor of {} is", ("Thomas", "Clara", "Paul", "Nina", "Omar")),
        ("The river that flows through {} is called the", ("Danube", "Rhine", "Volga", "Tagus", "Loire")),
        ("{} is best known for its", ("cheese", "carpets", "clocks", "cathedral", "apples")),
        ("The people of {} mostly speak", ("French", "Swahili", "German", "Arabic", "Spanish")),
        ("{} was founded in the year", ("1204", "1533", "1688", "1742", "1901")),
        ("The football team of {} is called the", ("Eagles", "Wolves", "Tigers", "Rovers", "Lions")),
        ("The twin town of {} is", ("Bergen", "Porto", "Kyoto", "Ghent", "Boston")),
    ),
    "company": (
        ("The chief executive of {} is", ("Laura", "David", "Emma", "George", "Ivan")),
        ("The headquarters of {} are in", ("Helsinki", "Madrid", "Chicago", "Singapore", "Prague")),
        ("{} mainly produces", ("tractors", "shoes", "software", "furniture", "chocolate")),
        ("{} was founded by", ("Karl", "Alice", "Hugo", "Martha", "Henry")),
        ("{} is owned by", ("Google", "Nestle", "Samsung", "Boeing", "Unilever")),
        ("The shares of {} are traded in", ("London", "Frankfurt", "Tokyo", "Mumbai", "Sydney")),
        ("The logo of {} shows a", ("bear", "rocket", "tree", "star", "ship")),
        ("The biggest customer of {} is", ("Ford", "Sony", "Airbus", "Shell", "Pfizer")),
    ),
}
_SYLLABLES = ("vel", "mar", "tok", "zan", "bri", "quo", "lun", "der", "pas", "fen", "gor", "hil", "nam", "rus", "cor")


def groups_of_one_subject(count: int, seed: int = 0) -> list[list[le.Fact]]:
    """`count` groups of 2 to 8 facts, each about one invented product, person, town or company."""
    draw = random.Random(seed)
    groups = []
    for number in range(count):
        kind = list(RELATIONS)[number % len(RELATIONS)]
        words = ["".join(draw.sample(_SYLLABLES, 2)).capitalize() for _ in range(2 if kind == "person" else 1)]
        if kind == "product":
            words.append(f"{draw.choice('ABCDEFGHKMRSTX')}{draw.randint(2, 99)}")
        chosen = draw.sample(RELATIONS[kind], 2 + number // len(RELATIONS) % 7)
        groups.append([le.Fact(prompt, " ".join(words), draw.choice(answers)) for prompt, answers in chosen])
    return groups


# name -> settings of the run
RULES: dict[str, dict[str, Any]] = {
    "joint": {"on_collision": "joint"},
    "keep": {"on_collision": "keep"},
    "merge": {"on_collision": "merge"},
    "rounds": {"facts_per_round": 1},
}


def replacement(fact: le.Fact) -> str:
    """Another answer of the fact's relation."""
    answers = next(answers for kind in RELATIONS.values() for prompt, answers in kind if prompt == fact.prompt)
    return answers[(answers.index(fact.target_new) + 1) % len(answers)]


def held_shares(
    lm: le.LanguageModel, method: le.Method, groups: Sequence[list[le.Fact]], rule: str, replaced: bool
) -> Iterator[tuple[int, ...]]:
    """Of each group, written by itself: facts, those that hold, and if `replaced`, those that hold after a change."""
    settings = le.RunSettings(progress_bar=False, **RULES[rule])
    covariance = le.estimate_covariance(lm, method, cache=True)
    for group in groups:
        with warnings.catch_warnings(), TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")  # each edit warns of its facts that do not hold
            if not replaced:
                edits = [le.edit(lm, group, method, covariance=covariance, settings=settings)]
            else:
                base = le.FactBase(Path(folder) / "base", method, covariance=covariance, settings=settings)
                base.add(group)
                edits = [base.apply(lm)]
                base.replace(group[0], replacement(group[0]))
                edits.append(base.apply(lm))
        yield len(group), *(sum(outcome.held for outcome in edit.outcomes) for edit in edits)
        edits[-1].revert(lm)


def main() -> None:
    """Print the share of facts that hold under each rule, by the size of the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="smollm2", help="the model")
    parser.add_argument("--groups", type=int, default=40, help="number of groups")
    parser.add_argument("--every", type=int, default=1, help="only every n-th group")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), help="what is compared")
    parser.add_argument("--replaced", action="store_true", help="also change a fact of each group; not for rounds")
    options = parser.parse_args()
    lm, groups = le.LanguageModel.load(options.lm), groups_of_one_subject(options.groups)[:: options.every]
    method = le.tune(lm)
    for rule in options.rules:
        found = []
        for number, one in enumerate(held_shares(lm, method, groups, rule, options.replaced), 1):
            found.append(one)
            print(f"{rule}: {number} of {len(groups)} groups", end="\r", file=sys.stderr, flush=True)
        facts, *held = map(sum, zip(*found, strict=True))
        shares = " and ".join(f"{100 * count / facts:.1f} %" for count in held)
        sizes = {size: [one for one in found if one[0] == size] for size in sorted({one[0] for one in found})}
        by_size = ", ".join(
            f"{size}: {100 * sum(one[1] for one in of_size) / size / len(of_size):.0f} %"
            for size, of_size in sizes.items()
        )
        print(f"{rule}: {shares} of {facts} facts hold; by size of the group {by_size}", flush=True)


if __name__ == "__main__":
    main()
