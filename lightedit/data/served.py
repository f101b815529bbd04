"""Prompts and targets as tokens, as they reach the model: after a separator, or in the model's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lightedit.data.fact import FactError, Serving
from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm import LanguageModel
from lightedit.lm.tokens import ChatTemplate, Tokens, tokenize


@dataclass(frozen=True)
class Encoded:
    """A prompt and its target as tokens.

    Attributes:
        ids: token ids of both.
        offsets: (start, end) of the characters of each token in the prompt as served; later tokens may have none.
        count: number of target tokens, at the end of `ids`.
        start: where the prompt's own text begins, in characters of the prompt as served.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    count: int
    start: int


class Pair(NamedTuple):
    """A prompt and its answer as a model reads them, whatever its kind.

    Attributes:
        ids: what the model reads: the prompt, and if answers follow it, the answer without its last token.
        targets: ids of the answer, predicted at `LanguageModel.reads(ids, targets)`.
    """

    ids: list[int]
    targets: list[int]


def encode_pairs(
    lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str], servings: Sequence[Serving] | None = None
) -> list[Pair]:
    """The tokens of prompts with their answers, as they reach `lm`.

    Args:
        lm: a model of any kind. For a classifier the answers are names of classes.
        prompts: n texts.
        targets: n answers, without the separator.
        servings: how each pair is served; None for the default.

    Raises:
        FactError: the model cannot give an answer, or a pair cannot be served so; see `encode_targets`.
        UnsupportedModelError: a pair is served in the chat template, and there is none.
    """
    servings = servings or [Serving()] * len(prompts)
    if not lm.answers.apart:
        whole = encode_targets(lm.tokenizer, prompts, targets, servings)
        return [Pair(ids[:-1], ids[-count:]) for ids, count in whole]
    for serving in set(servings):
        if serving.chat:
            raise UnsupportedModelError(f"{lm.name} is {lm.answers.described}, which serves no chat; leave chat out")
        if serving.separator not in (" ", ""):
            raise FactError(
                f"separator: {serving.separator!r}, but the answer of {lm.answers.described} stands apart from its "
                "prompt; leave separator out"
            )
    try:
        rows = lm.answers.rows(prompts)
        answers = [lm.answers.answer(*pair) for pair in zip(targets, (s.end_turn for s in servings), strict=True)]
    except ArgumentError as error:
        raise FactError(str(error)) from error
    return [Pair(row, answer) for row, answer in zip(rows, answers, strict=True)]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    servings: Sequence[Serving] | None = None,
) -> list[tuple[list[int], int]]:
    """Tokenise each prompt with its target as they reach the model, and find the target's tokens.

    Args:
        tokenizer: the tokenizer.
        prompts: n texts.
        targets: n answers, without the separator.
        servings: how each pair is served; None for after one space, without a chat template.

    Returns:
        For each pair: all token ids, and the number of target tokens at their end.

    Raises:
        FactError: a target has no token of its own, or holds a token that the tokenizer does not know; or a pair cannot
            be served so.
    """
    servings = servings or [Serving()] * len(prompts)
    return [(row.ids, row.count) for row in encode_served(tokenizer, prompts, targets, servings)]


def encode_served(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str], servings: Sequence[Serving]
) -> list[Encoded]:
    """Tokenise each prompt with its target as they reach the model; see `encode_targets` for arguments and errors."""
    rows: dict[int, Encoded] = {}
    for chat in (False, True):
        chosen = [index for index, serving in enumerate(servings) if serving.chat == chat]
        if not chosen:
            continue
        texts, start = as_served(tokenizer, [prompts[index] for index in chosen], chat)
        answers = [("" if chat else servings[index].separator) + targets[index] for index in chosen]
        wholes = tokens_of(tokenizer, [text + answer for text, answer in zip(texts, answers, strict=True)], chat)
        # one space before an answer parts the tokens of both in every tokenizer
        apart = [i for i, index in enumerate(chosen) if chat or servings[index].separator != " "]
        alone = dict(zip(apart, tokens_of(tokenizer, [texts[i] for i in apart], chat), strict=True))
        end = _end_of_turn(tokenizer, chat) if any(servings[index].end_turn for index in chosen) else []
        for i, index in enumerate(chosen):
            if i in alone:
                tokens, count = _after_prompt(tokenizer, texts[i], alone[i], answers[i], wholes[i])
            else:
                tokens, count = _by_offsets(texts[i], wholes[i])
            if count in (0, len(tokens.ids)) or tokenizer.unk_token_id in tokens.ids[-count:]:
                raise FactError(
                    f"target {targets[index]!r} after {prompts[index]!r}: the tokenizer cannot spell it; use other "
                    "words"
                )
            ending = end if servings[index].end_turn else []
            rows[index] = Encoded([*tokens.ids, *ending], tokens.offsets, count + len(ending), start)
    return [rows[index] for index in range(len(prompts))]


def as_served(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool) -> tuple[Sequence[str], int]:
    """The prompts as they reach the model, and where each prompt's own text begins in it.

    Raises:
        FactError: the chat template changes a prompt.
        UnsupportedModelError: `chat`, and there is no chat template.
    """
    if not chat:
        return prompts, 0
    template = ChatTemplate.of(tokenizer)
    try:
        return [template.prompt(prompt) for prompt in prompts], len(template.before)
    except ArgumentError as error:
        raise FactError(str(error)) from error


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool) -> list[Tokens]:
    """Tokenise texts; those of the chat template hold their special tokens.

    Raises:
        FactError: a text holds half of a surrogate pair.
    """
    try:
        return tokenize(tokenizer, texts, special=not chat)
    except ArgumentError as error:
        raise FactError(str(error)) from error


def _by_offsets(text: str, whole: Tokens) -> tuple[Tokens, int]:
    """The tokens of a prompt and its answer, and the number of those behind the prompt's last character."""
    ids, offsets = whole
    first = next((i for i, (_, end) in enumerate(offsets) if end > len(text)), len(ids))
    last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1) + 1
    return Tokens(ids[:last], offsets[:last]), max(0, last - first)


def _after_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt: Tokens, answer: str, whole: Tokens
) -> tuple[Tokens, int]:
    """The tokens of a prompt followed by those of its answer, and the number of the latter; as in generation.

    A tokenizer may join the last characters of a prompt with the first ones of its answer to one token. The model never
    meets that token after this prompt.
    """
    rest = whole.ids[len(prompt.ids) :]
    if whole.ids[: len(prompt.ids)] != prompt.ids:
        # after a line break, which tokenizers join with no letter, the answer has the tokens of the middle of a text
        (behind_break,) = tokens_of(tokenizer, ["\n" + answer], chat=True)
        rest = [token for token, (_, end) in zip(*behind_break, strict=True) if end > 1]
        before, joined = (
            str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (prompt.ids, [*prompt.ids, *rest])
        )
        if joined[len(before) :] != answer:
            raise FactError(
                f"target {answer!r} directly after {text!r}: the tokenizer joins both, so the model cannot say it "
                "there; end the prompt elsewhere, or set another separator"
            )
    return Tokens([*prompt.ids, *rest], prompt.offsets), len(rest)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """The tokens that end an answer."""
    end = ChatTemplate.of(tokenizer).end() if chat else [tokenizer.eos_token_id]
    if not end or end[-1] is None:
        source = "chat template ends an answer with" if chat else "tokenizer has"
        raise FactError(f"end_turn: the model's {source} no end token; leave end_turn out")
    return end
