"""Facts as token ids: contexts, the subject's last token, and the target's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from lightedit.data.facts import Fact, FactError
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel

KL_TEMPLATE = "{} is a"  # prompt of the KL term in the published loss


@dataclass(frozen=True)
class Contexts:
    """Texts that precede a prompt, so that a key and a value do not depend on a single context.

    Attributes:
        templates: each holds one "{}" for the prompt; the first is the bare "{}".
        key_weights: the weight of each context in a fact's averaged key; they sum to 1.
    """

    templates: tuple[str, ...] = ("{}",)
    key_weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.templates[:1] != ("{}",) or any(template.count("{}") != 1 for template in self.templates):
            raise ArgumentError(f"contexts start with the bare '{{}}' and each holds one '{{}}', got {self.templates}")
        if len(self.key_weights) != len(self.templates) or abs(sum(self.key_weights) - 1) > 1e-9:
            raise ArgumentError(
                f"{len(self.templates)} contexts need as many weights summing to 1, got {self.key_weights}"
            )


@dataclass(frozen=True)
class ContextSettings:
    """Settings for sampling contexts from the model.

    Attributes:
        prefixes: (first words, number of texts, tokens of each with the first words); "" starts from the text-start
            token.
        bare_weight: weight of the bare prompt in the averaged key; None gives every context the same weight.
        seed: seed of the sampling.
    """

    prefixes: tuple[tuple[str, int, int], ...] = tuple(
        (word, 1, 10) for word in ("The", "Therefore", "Because", "I", "You")
    )
    bare_weight: float | None = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for word, count, length in self.prefixes:
            if count < 0 or length < 1:
                raise ArgumentError(
                    f"prefixes: {count} of {length} tokens that begin with {word!r} cannot be; give (first words, how "
                    "many, length in tokens)"
                )
        if self.bare_weight is not None and not 0 < self.bare_weight <= 1:
            raise ArgumentError(f"bare_weight is a share, above 0 and at most 1, or None, got {self.bare_weight}")

    def sample(self, lm: LanguageModel) -> Contexts:
        """Generate the prefixes with `lm` by top-5 sampling."""
        templates = ["{}"]
        for start, count, length in self.prefixes:
            begin = lm.encode([start])[0] if start else [lm.text_start]
            new = max(1, length - len(begin))
            # each entry has its own seed; with one seed, entries with equal first words would give equal texts
            for ids in lm.generate([begin] * count, new, top_k=5, seed=self.seed + len(templates)):
                text = lm.decode([*begin, *ids]).replace("{", " ").replace("}", " ").strip()
                templates.append(f"{text}. {{}}")
        others = len(templates) - 1
        bare = 1 / (others + 1) if self.bare_weight is None or not others else self.bare_weight
        return Contexts(tuple(templates), (bare, *([(1 - bare) / others] * others)) if others else (1.0,))


@dataclass(frozen=True)
class Row:
    """One tokenised text.

    Attributes:
        ids: token ids without the target's last token, from which nothing is predicted.
        lookup: position of the subject's last token.
        targets: the target's token ids, predicted at the last `len(targets)` positions.
    """

    ids: list[int]
    lookup: int
    targets: list[int]


@dataclass(frozen=True)
class FactPrompts:
    """The prompt rows of one key and one value: those of a fact, or of several facts that share both.

    Attributes:
        fact: the fact, or the first of several.
        rows: one for each context, the bare prompt first; the rows of several facts follow one another.
        subject: the tokens of "{subject} is a" up to the subject's last token, where the KL term is read.
        key_weights: weight of each row in the averaged key; they sum to 1.
        bare: indices of the rows that are bare prompts.
    """

    fact: Fact
    rows: tuple[Row, ...]
    subject: Row
    key_weights: tuple[float, ...]
    bare: tuple[int, ...] = (0,)


def merge_prompts(members: Sequence[FactPrompts]) -> FactPrompts:
    """Merge several facts into one: they share the mean of their keys, and one value optimised on all their rows."""
    starts = accumulate((len(member.rows) for member in members), initial=0)
    return FactPrompts(
        members[0].fact,
        tuple(row for member in members for row in member.rows),
        members[0].subject,
        tuple(weight / len(members) for member in members for weight in member.key_weights),
        tuple(start + row for member, start in zip(members, starts, strict=False) for row in member.bare),
    )


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str]
) -> list[tuple[list[int], int]]:
    """Tokenise each "prompt target" as one text, and find the target's tokens by their character offsets.

    Returns:
        For each pair: all token ids, and the number of target tokens at their end.

    Raises:
        FactError: a target has no token of its own, or holds a token that the tokenizer does not know.
    """
    if not prompts:
        return []
    encoding = tokenizer(
        [f"{prompt} {target}" for prompt, target in zip(prompts, targets, strict=True)],
        return_offsets_mapping=True,
    )
    encoded = []
    for prompt, target, ids, offsets in zip(
        prompts, targets, encoding["input_ids"], encoding["offset_mapping"], strict=True
    ):
        first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1) + 1
        spelled = ids[first:last]
        if not spelled or first == 0 or tokenizer.unk_token_id in spelled:
            raise FactError(f"target {target!r} after {prompt!r}: the tokenizer cannot spell it; use other words")
        encoded.append((ids[:last], len(spelled)))
    return encoded


def subject_positions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ends: Sequence[int]
) -> list[tuple[list[int], int]]:
    """Token ids of each text, and the position of the token that holds the last character before its `ends`.

    If several tokens share that character (byte fallback), the position is that of the last one.
    """
    encoding = tokenizer(list(texts), return_offsets_mapping=True)
    found = []
    for text, end, ids, offsets in zip(texts, ends, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        holding = [i for i, (start, stop) in enumerate(offsets) if start < end <= stop]
        if not holding:
            raise FactError(f"no token of {text!r} holds the subject's last character {text[end - 1]!r}")
        found.append((ids, holding[-1]))
    return found


def tokenize_facts(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], contexts: Contexts) -> list[FactPrompts]:
    """Tokenise every fact in every context."""
    texts, ends, targets = [], [], []
    for fact in facts:
        for template in contexts.templates:
            texts.append(template.replace("{}", fact.text))
            ends.append(template.index("{}") + fact.prompt.index("{}") + len(fact.subject))
            targets.append(fact.target_new)
    encoded = encode_targets(tokenizer, texts, targets)
    wholes = [f"{text} {target}" for text, target in zip(texts, targets, strict=True)]
    positions = subject_positions(tokenizer, wholes, ends)
    rows = [Row(ids[:-1], lookup, ids[-count:]) for (ids, count), (_, lookup) in zip(encoded, positions, strict=True)]
    subjects = subject_positions(
        tokenizer,
        [KL_TEMPLATE.replace("{}", fact.subject) for fact in facts],
        [len(fact.subject) for fact in facts],
    )
    width = len(contexts.templates)
    return [
        FactPrompts(
            fact, tuple(rows[i * width : (i + 1) * width]), Row(ids[: lookup + 1], lookup, []), contexts.key_weights
        )
        for i, (fact, (ids, lookup)) in enumerate(zip(facts, subjects, strict=True))
    ]
