"""Facts as token ids: contexts, the subject's last token, and the target's tokens."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from lightedit.data.fact import Fact, FactError
from lightedit.data.served import Encoded, as_served, encode_pairs, encode_served, tokens_of
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


_KEPT: WeakKeyDictionary[LanguageModel, dict[str, Contexts]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ContextSettings:
    """Settings for sampling contexts from the model.

    Attributes:
        prefixes: (first words, number of texts, tokens of each with the first words); "" starts from the text-start
            token.
        bare_weight: weight of the bare prompt in the averaged key; None gives every context the same weight.
        seed: seed of the sampling.
        separate: whether a solve writes a fact at its key in every context, with the context's weight; False writes it
            at the averaged key, as published. The averaged key of a short prompt may be far from each of its keys.
    """

    prefixes: tuple[tuple[str, int, int], ...] = tuple(
        (word, 1, 10) for word in ("The", "Therefore", "Because", "I", "You")
    )
    bare_weight: float | None = 0.5
    seed: int = 0
    separate: bool = False

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
        """Generate the prefixes with `lm` by top-5 sampling; those of an unedited model are kept while it lives."""
        if lm.weights.owners:
            return self._sampled(lm)
        kept = _KEPT.setdefault(lm, {})  # by repr, which holds lists too
        if repr(self) not in kept:
            kept[repr(self)] = self._sampled(lm)
        return kept[repr(self)]

    def _sampled(self, lm: LanguageModel) -> Contexts:
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
        targets: the target's token ids, predicted at the last `len(targets)` positions. Where answers stand apart from
            prompts (see `tokenize_answers`), `ids` holds the prompt alone.
        first: position of the subject's first token; None without a subject.
    """

    ids: list[int]
    lookup: int
    targets: list[int]
    first: int | None = None


@dataclass(frozen=True)
class FactPrompts:
    """The prompt rows of one key and one value: those of a fact, or of several facts that share both.

    Attributes:
        fact: the fact, or the first of several.
        rows: one for each context, the bare prompt first; the rows of several facts follow one another.
        subject: the tokens of "{subject} is a" up to the subject's last token, where the KL term is read; without a
            subject the bare prompt, up to where it is read.
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


def subject_positions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[tuple[int, int]], chat: bool = False
) -> list[tuple[list[int], int, int]]:
    """Token ids of each text, and the positions of the last and the first token of its subject.

    If several tokens share the subject's last character (byte fallback), the last position is that of the last one.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        spans: where the subjects start and end in them, in characters.
        chat: whether the texts are rendered by the chat template, so that they hold their special tokens.
    """
    return [
        (ids, _holding(text, text[end - 1], end, offsets), _first_token(start, offsets))
        for text, (start, end), (ids, offsets) in zip(texts, spans, tokens_of(tokenizer, texts, chat), strict=True)
    ]


def _holding(text: str, character: str, end: int, offsets: Sequence[tuple[int, int]]) -> int:
    """The last token that holds `character`, the one before `end`."""
    holding = [i for i, (start, stop) in enumerate(offsets) if start < end <= stop]
    if not holding:
        raise FactError(f"no token of {text!r} holds the subject's last character {character!r}")
    return holding[-1]


def tokenize_facts(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], contexts: Contexts, read_keys: bool = True
) -> list[FactPrompts]:
    """Tokenise every fact in every context, as its prompts reach the model.

    A fact whose subject is one token, and the first of the bare prompt, is warned of if keys are read: a model's first
    token mostly has the same key whatever it is.

    Raises:
        FactError: a fact cannot be tokenised, or served as it asks for.
    """
    pairs = [(fact, template) for fact in facts for template in contexts.templates]
    encoded = encode_served(
        tokenizer,
        [template.replace("{}", fact.text) for fact, template in pairs],
        [fact.target_new for fact, _ in pairs],
        [fact.serving for fact, _ in pairs],
    )
    rows = [
        Row(row.ids[:-1], _lookup(fact, template, row), row.ids[-row.count :], _first(fact, template, row))
        for (fact, template), row in zip(pairs, encoded, strict=True)
    ]
    width = len(contexts.templates)
    bare = rows[::width]
    if read_keys:
        _warn_of_first_tokens(facts, bare)
    return [
        FactPrompts(fact, tuple(rows[i * width : (i + 1) * width]), subject, contexts.key_weights)
        for i, (fact, subject) in enumerate(zip(facts, _kl_rows(tokenizer, facts, bare), strict=True))
    ]


def tokenize_answers(lm: LanguageModel, facts: Sequence[Fact]) -> list[FactPrompts]:
    """Tokenise every fact's bare prompt and target as `lm`, of any kind, reads them.

    It is for editors that need neither contexts nor the position of a subject. Where answers stand apart from prompts,
    `lookup` is the token that stands for the prompt, such as [CLS]; else it is as `tokenize_facts` gives it.

    Raises:
        FactError: a fact cannot be tokenised, or served as it asks for.
    """
    if not lm.answers.apart:
        return tokenize_facts(lm.tokenizer, facts, Contexts(), read_keys=False)
    texts, targets = [fact.text for fact in facts], [fact.target_new for fact in facts]
    pairs = encode_pairs(lm, texts, targets, [fact.serving for fact in facts])
    queries = [lm.answers.query(pair.ids) for pair in pairs]
    return [
        FactPrompts(fact, (Row(pair.ids, query, pair.targets),), Row(pair.ids, query, []), (1.0,))
        for fact, pair, query in zip(facts, pairs, queries, strict=True)
    ]


def _lookup(fact: Fact, template: str, row: Encoded) -> int:
    """The position at which the key of a fact is read in its row."""
    start = row.start + template.index("{}")  # of the fact's own text
    if fact.subject is not None:
        end = start + fact.prompt.index("{}") + len(fact.subject)
        return _holding(fact.text, fact.subject[-1], end, row.offsets)
    stop = len(row.ids) - row.count
    first = _first_token(start, row.offsets)
    position = -1 if fact.position is None else fact.position
    if not first - stop <= position < stop - first:
        raise FactError(
            f"position: {position} in {fact.prompt!r}, which has {stop - first} tokens; give one from {first - stop} "
            f"to {stop - first - 1}"
        )
    return (stop if position < 0 else first) + position


def _first(fact: Fact, template: str, row: Encoded) -> int | None:
    """The position of the subject's first token in its row; None without a subject."""
    if fact.subject is None:
        return None
    return _first_token(row.start + template.index("{}") + fact.prompt.index("{}"), row.offsets)


def _first_token(start: int, offsets: Sequence[tuple[int, int]]) -> int:
    """The first token that holds a character at or behind `start`."""
    return next(i for i, (_, end) in enumerate(offsets) if end > start)


def _kl_rows(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], bare: Sequence[Row]) -> list[Row]:
    """The row of each fact's KL term: "{subject} is a" up to the subject, or the bare prompt without a subject."""
    found: dict[int, Row] = {}
    for chat in (False, True):
        subjects = {i: fact.subject for i, fact in enumerate(facts) if fact.chat == chat and fact.subject is not None}
        if subjects:
            texts, start = as_served(tokenizer, [KL_TEMPLATE.replace("{}", name) for name in subjects.values()], chat)
            spans = [(start, start + len(name)) for name in subjects.values()]
            for i, (ids, lookup, first) in zip(subjects, subject_positions(tokenizer, texts, spans, chat), strict=True):
                found[i] = Row(ids[: lookup + 1], lookup, [], first)
    return [found[i] if i in found else _kl_row_of_prompt(row) for i, row in enumerate(bare)]


def _kl_row_of_prompt(row: Row) -> Row:
    """The row of the KL term of a fact without subject, which ends where the term is read.

    It is read at the key's token. If this token predicts the target, the term would oppose the target, so it is read
    behind the target.
    """
    if row.lookup == len(row.ids) - len(row.targets):
        return Row([*row.ids, row.targets[-1]], row.lookup, [])
    return Row(row.ids[: row.lookup + 1], row.lookup, [])


def _warn_of_first_tokens(facts: Sequence[Fact], bare: Sequence[Row]) -> None:
    named = [fact.text for fact, row in zip(facts, bare, strict=True) if row.lookup == 0]
    if named:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        warnings.warn(
            f"the key of {', '.join(map(repr, named[:3]))}{more} is read at the first token of the text, where many "
            "models have nearly the same key for every token, so the edit may change other facts and not hold; put "
            'words before the subject, such as "The country of {}"',
            stacklevel=2,
        )


def check_facts_fit(lm: LanguageModel, facts: Sequence[Fact]) -> None:
    """Check that `lm` can be taught these facts, before anything is computed from them.

    Raises:
        FactError: a fact cannot be tokenised or served as it asks for; or it is longer than the model's positions, or
            holds a token without a row in the embedding. The message says which fact, from 0.
        UnsupportedModelError: a fact is served in the chat template, and there is none.
    """
    texts, targets = [fact.text for fact in facts], [fact.target_new for fact in facts]
    pairs = encode_pairs(lm, texts, targets, [fact.serving for fact in facts])
    last = 0 if lm.answers.apart else 1  # the target's last token is checked with the others of its row
    _check_rows(lm, ([[*pair.ids, *pair.targets[len(pair.targets) - last :]]] for pair in pairs))


def check_rows(lm: LanguageModel, prompts: Sequence[FactPrompts]) -> None:
    """Raise FactError with a fact's number, from 0, if `lm` cannot run its rows; see `LanguageModel.check_rows`."""
    _check_rows(lm, ([*(row.ids for row in fact.rows), fact.subject.ids] for fact in prompts))


def _check_rows(lm: LanguageModel, rows_of_facts: Iterable[Sequence[Sequence[int]]]) -> None:
    for number, rows in enumerate(rows_of_facts):
        try:
            lm.check_rows(rows)
        except ArgumentError as error:
            raise FactError(f"fact {number}: {error}") from error
