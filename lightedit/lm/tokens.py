"""Texts as tokens: special tokens, tokenising, and the chat template around a user's turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightedit.errors import ArgumentError, UnsupportedModelError


def pad_token(tokenizer: PreTrainedTokenizerBase, entries: int | None = None) -> int:
    """A token id for padding. Padding is masked, so any id serves that has one of the `entries` of the embedding.

    A padding token is often added to the tokenizer alone.
    """
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return _first(*(token for token in named if token is not None and (entries is None or token < entries)), 0)


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first token of a text: beginning-of-text, or end-of-text if there is none."""
    return _first(tokenizer.bos_token_id, tokenizer.eos_token_id, pad_token(tokenizer))


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those in the checkpoint's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # custom classes may have none
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _first(*tokens: int | None) -> int:
    return next(int(token) for token in tokens if token is not None)


class Tokens(NamedTuple):
    """The token ids of a text, and the (start, end) of each token's characters."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[Tokens]:
    """Tokenise each text, with the special tokens that the tokenizer puts before it, and without those after it.

    Some tokenizers append an end-of-text token. A text that is to be continued must not end in one.

    Args:
        tokenizer: a fast tokenizer.
        texts: the texts.
        special: whether special tokens are added; False for texts that hold them, as those of a chat template do.

    Raises:
        ArgumentError: a text holds half of a surrogate pair.
    """
    _check_whole(texts)
    if not texts:
        return []
    # the arguments are left out where they are the default, for tokenizers of few arguments
    arguments: dict[str, Any] = {} if special else {"add_special_tokens": False}
    encoding = tokenizer(list(texts), return_offsets_mapping=True, **arguments)
    appended = _appended(tokenizer) if special else 0
    return [
        Tokens(ids[: len(ids) - appended], offsets[: len(ids) - appended])
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def whole_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """Token ids of each text, with all special tokens that the tokenizer puts around it, or with none.

    Raises:
        ArgumentError: a text holds half of a surrogate pair.
    """
    _check_whole(texts)
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _check_whole(texts: Sequence[str]) -> None:
    for text in texts:
        if half := next((char for char in text if "\ud800" <= char <= "\udfff"), None):
            raise ArgumentError(
                f"{text!r} holds {half!r}, half of a character (as a cut emoji leaves it); complete or remove it"
            )


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of special tokens that the tokenizer puts after a text; they span no characters."""
    (offsets,) = tokenizer(["a"], return_offsets_mapping=True)["offset_mapping"]
    return len(offsets) - max(i + 1 for i, (start, end) in enumerate(offsets) if end > start)


_CONTENT = "qzxwvjk"  # stands for a turn's text while a template is read; no template holds or changes it


@dataclass(frozen=True)
class ChatTemplate:
    """The text that a tokenizer's chat template puts around one turn of the user, up to the assistant's turn.

    The template is rendered as `apply_chat_template` does with `add_generation_prompt`: its own system prompt or
    thinking block included.

    Attributes:
        tokenizer: the tokenizer.
        before: text before the user's words, special tokens included.
        after: text between the user's words and the assistant's answer.
    """

    tokenizer: PreTrainedTokenizerBase
    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
        """Read the chat template of `tokenizer`.

        Raises:
            UnsupportedModelError: there is none, or it cannot serve a single turn of the user.
        """
        if not tokenizer.chat_template:
            raise UnsupportedModelError(
                "the model's tokenizer has no chat template, so it serves no chat; leave chat out, or set "
                "tokenizer.chat_template"
            )
        parts = _render(tokenizer, _CONTENT).split(_CONTENT)
        if len(parts) != 2:
            raise UnsupportedModelError(
                f"the chat template writes the user's words {len(parts) - 1} times; only templates that write them "
                "once are supported"
            )
        return cls(tokenizer, *parts)

    def prompt(self, text: str) -> str:
        """The user's words `text` in the template, up to the assistant's answer.

        Raises:
            ArgumentError: the template changes the words, for example white space at their ends.
        """
        rendered = _render(self.tokenizer, text)
        if rendered != f"{self.before}{text}{self.after}":
            raise ArgumentError(
                f"the chat template changes the text {text!r}; remove white space at its ends, and words that mean "
                "something to the template"
            )
        return rendered

    def end(self) -> list[int]:
        """The token ids with which the template ends an answer, the last one a special token; empty without one."""
        answer = _CONTENT[::-1]
        rest = _render(self.tokenizer, _CONTENT, answer).partition(answer)[2]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        (tokens,) = tokenize(self.tokenizer, [rest], special=False)
        return tokens.ids[: next((i + 1 for i, token in enumerate(tokens.ids) if token in special), 0)]


def _render(tokenizer: PreTrainedTokenizerBase, text: str, answer: str | None = None) -> str:
    turns = [{"role": "user", "content": text}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
    except Exception as error:  # templates raise many different classes
        raise UnsupportedModelError(
            f"the chat template cannot render a turn of the user ({type(error).__name__}: {error}); leave chat out"
        ) from error


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool = False) -> list[list[int]]:
    """Token ids of texts that are to be continued: as they are, or as the user's turn in the chat template.

    Raises:
        UnsupportedModelError: `chat`, and the tokenizer has no chat template.
        ArgumentError: a text cannot be tokenised, or the template changes it.
    """
    if chat and texts:
        template = ChatTemplate.of(tokenizer)
        texts = [template.prompt(text) for text in texts]
    return [tokens.ids for tokens in tokenize(tokenizer, texts, special=not chat)]
