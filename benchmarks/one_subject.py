"""Groups of facts about one invented subject, and how many of them hold under each rule for colliding keys.

    python -m benchmarks.one_subject --groups 40

Every group holds 2 to 8 facts about one subject that no model knows. A fact is held if the greedy continuation of its
prompt begins with the target.
"""

import argparse
import random
from collections.abc import Sequence

import lightedit as le
from lightedit.evaluation.generation import generate

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
        ("The {} was designed by", ("Maria Lopez", "John Carter", "Anna Weber", "Peter Novak", "Li Wei")),
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
        ("The mayor of {} is", ("Thomas Berg", "Clara Ruiz", "Paul Martin", "Nina Petrov", "Omar Hassan")),
        ("The river that flows through {} is called the", ("Danube", "Rhine", "Volga", "Tagus", "Loire")),
        ("{} is best known for its", ("cheese", "carpets", "clocks", "cathedral", "apples")),
        ("The people of {} mostly speak", ("French", "Swahili", "German", "Arabic", "Spanish")),
        ("{} was founded in the year", ("1204", "1533", "1688", "1742", "1901")),
        ("The football team of {} is called the", ("Eagles", "Wolves", "Tigers", "Rovers", "Lions")),
        ("The twin town of {} is", ("Bergen", "Porto", "Kyoto", "Ghent", "Boston")),
    ),
    "company": (
        ("The chief executive of {} is", ("Laura Stein", "David Chen", "Emma Brown", "Raj Patel", "Ivan Horvat")),
        ("The headquarters of {} are in", ("Helsinki", "Madrid", "Chicago", "Singapore", "Prague")),
        ("{} mainly produces", ("tractors", "shoes", "software", "furniture", "chocolate")),
        ("{} was founded by", ("Karl Braun", "Alice Moore", "Hugo Silva", "Mei Tanaka", "George Adams")),
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


def held(lm: le.LanguageModel, facts: Sequence[le.Fact]) -> list[bool]:
    """For each fact, whether the greedy continuation of its prompt begins with the target."""
    prompts = [fact.text for fact in facts]
    texts = generate(lm, prompts, max_new_tokens=8, greedy=True)
    pairs = zip(texts, prompts, facts, strict=True)
    return [text[len(prompt) :].strip().startswith(fact.target_new) for text, prompt, fact in pairs]
