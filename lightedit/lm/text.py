"""The part of a language model that reads and writes text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import overload

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm.batch import Batch
from lightedit.lm.kinds import Kind
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.sampling import before_end, draw_rule
from lightedit.lm.tokens import ChatTemplate, end_tokens, pad_token, prompt_tokens, start_token

_SHOWN = 60  # characters of a text in an error


class TextModel(ABC):
    """Base of `LanguageModel`: text to tokens, tokens to text, and generation.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        name: its name or path.
        answers: how it is asked, and how it answers.
    """

    answers: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @abstractmethod
    def forward(self, batch: Batch, cache: DynamicCache | None = None, keep: int | None = None) -> Tensor:
        """Run one forward pass."""

    @abstractmethod
    def with_edits(self, edits: RowwiseEdits) -> AbstractContextManager[None]:
        """Within the context, each row of a forward pass sees its own edit."""

    @property
    def device(self) -> torch.device:
        """The device of token ids, which is that of the input embeddings."""
        return self._embedding.device

    @property
    def _embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def pad_id(self) -> int:
        """A token id for padding. Padding is masked, so any id with a row in the embedding serves."""
        return pad_token(self.tokenizer, self._embedding.shape[0])

    @property
    def text_start(self) -> int:
        """The first token of a text: beginning-of-text, or end-of-text if there is none."""
        return start_token(self.tokenizer)

    @property
    def positions(self) -> int | None:
        """Most tokens of a text, from the model's configuration; None if it names no limit."""
        return self.answers.positions()

    def check_rows(self, rows: Sequence[Sequence[int]], new: int | Sequence[int] = 0) -> None:
        """Check, before work starts, that the model can run these rows.

        Args:
            rows: token ids.
            new: tokens that are to be generated after each row; one number, or one a row. The last one is not read.

        Raises:
            ArgumentError: a row has more tokens than the model has positions, or a token without a row in the
                embedding.
        """
        limit = self.positions
        more = [new] * len(rows) if isinstance(new, int) else new
        if self.answers.apart:
            more = [0] * len(rows)
        for row, extra in zip(rows, more, strict=True):
            if limit is not None and len(row) + max(0, extra - 1) > limit:
                asked = f", with {extra} new ones too many" if extra and len(row) <= limit else ""
                raise ArgumentError(
                    f"{self._shown(row)} has {len(row)} tokens{asked}; {self.name} has {limit} positions. Shorten the "
                    "text" + (", or ask for fewer new tokens" if asked else "")
                )
        self.check_tokens(rows)

    def check_tokens(self, rows: Sequence[Sequence[int]]) -> None:
        """Raise ArgumentError if a token of these rows has no row in the embedding, so that it is never written either.

        Such tokens were added to the tokenizer, and the embedding was not resized.
        """
        entries = self._embedding.shape[0]
        for row in rows:
            if row and (token := max(row)) >= entries:
                raise ArgumentError(
                    f"the token {self.tokenizer.convert_ids_to_tokens(token)!r} (id {token}) in {self._shown(row)} "
                    f"has no row in the embedding of {self.name}, which has {entries}; use other words, or call "
                    "resize_token_embeddings on the model"
                )

    def _shown(self, row: Sequence[int]) -> str:
        text = self.decode(row) or str(self.tokenizer.decode(list(row)))  # special tokens, if there are no others
        return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")

    def encode(self, texts: Sequence[str], chat: bool = False) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the tokenizer puts before it.

        Special tokens that the tokenizer puts after a text are left out, so that it can be continued. They are kept
        where answers stand apart, as in classifiers and encoder-decoders.

        Args:
            texts: the texts.
            chat: whether they are the user's turn in the chat template, up to the assistant's answer.

        Raises:
            ArgumentError: a text holds half of a surrogate pair, or the chat template changes it.
            UnsupportedModelError: there is no chat template.
        """
        if not self.answers.apart:
            return prompt_tokens(self.tokenizer, texts, chat)
        if chat and texts:
            raise UnsupportedModelError(
                f"{self.name} is {self.answers.described}, which serves no chat; leave chat out"
            )
        return self.answers.rows(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        *,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        stop_at_end: bool = True,
        edits: RowwiseEdits | None = None,
        chat: bool = False,
    ) -> list[list[int]]:
        """Continue each prompt greedily, or by sampling from the `top_k` most probable tokens.

        Of the checkpoint's generation config, only the end-of-text tokens are used.

        Args:
            prompts: texts or token ids.
            max_new_tokens: tokens of a continuation at most.
            top_k: None for greedy.
            seed: one for all prompts, or one for each. With one for each, the draws of a prompt depend neither on its
                batch nor on the other prompts.
            batch_size: prompts continued together.
            stop_at_end: whether an end-of-text token ends a continuation.
            edits: which edit each prompt sees on top of the changes in the weights; one row for each prompt.
            chat: whether texts are the user's turn in the chat template, whose end-of-turn token then ends a
                continuation, too.

        Returns:
            New token ids of each prompt, cut before an end-of-text token when `stop_at_end`.

        Raises:
            ArgumentError: the numbers of seeds and prompts differ, `max_new_tokens` is below 1, or the model cannot run
                a prompt with so many new tokens.
            UnsupportedModelError: `chat`, and there is no chat template.
            FloatingPointError: the best logits are NaN or infinite; checked only with a seed for each prompt.
        """
        if max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
        rows = [self.encode([p], chat)[0] if isinstance(p, str) else list(p) for p in prompts]
        self.check_rows(rows, max_new_tokens)
        rule = draw_rule(top_k, seed, len(rows), max_new_tokens, self.device)
        ends = self._ends(chat) if stop_at_end else ()
        edits = edits or RowwiseEdits.none(len(rows))
        results: list[list[int]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        for group in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            with self.with_edits(edits.rows(group)):
                stream = self.answers.stream(self.forward, [rows[i] for i in group], self.pad_id, rule(group))
                found = before_end(stream, max_new_tokens, ends)
            for i, row in zip(group, found, strict=True):
                results[i] = row
        return results

    def _ends(self, chat: bool) -> list[int]:
        """The tokens that end a continuation."""
        if self.answers.name == "classifier":  # classes have ids of their own
            return []
        ends = end_tokens(self.tokenizer, self.model)
        return [*ends, *ChatTemplate.of(self.tokenizer).end()[-1:]] if chat else ends

    @overload
    def complete(
        self, text: str, chat: bool = ..., max_new_tokens: int = ..., top_k: int | None = ..., seed: int = ...
    ) -> str: ...

    @overload
    def complete(
        self, text: list[str], chat: bool = ..., max_new_tokens: int = ..., top_k: int | None = ..., seed: int = ...
    ) -> list[str]: ...

    def complete(
        self,
        text: str | list[str],
        chat: bool = False,
        max_new_tokens: int = 20,
        top_k: int | None = None,
        seed: int = 0,
    ) -> str | list[str]:
        """What the model, with its present weights, writes after a text, or as the answer to it.

            lm.complete("The capital of France is")  # " Paris, and ..."
            lm.complete(["What is the capital of France?", "And of Italy?"], chat=True)

        Args:
            text: a text, or several.
            chat: whether it is the user's turn in the model's chat template.
            max_new_tokens: most new tokens.
            top_k: number of most probable tokens that are sampled from; None takes the most probable one (greedy).
            seed: seed of the sampling. The texts of one call draw from one generator in turn.

        Returns:
            The new text, up to the end of the text or turn; a list for a list.

        Raises:
            ArgumentError: a number is out of range, or the model cannot run a text.
            UnsupportedModelError: `chat`, and the model has no chat template.
        """
        texts = [text] if isinstance(text, str) else text
        rows = self.encode(texts, chat)
        for given, row in zip(texts, rows, strict=True):
            if not row:
                raise ArgumentError(f"text: {given!r} has no token to continue; give some text")
        continued = self.generate(texts, max_new_tokens, top_k=top_k, seed=seed, chat=chat)
        written = [self.continuation(row, new) for row, new in zip(rows, continued, strict=True)]
        return written[0] if isinstance(text, str) else written

    def continuation(self, row: Sequence[int], new: Sequence[int]) -> str:
        """The text of token ids `new` after `row`. Decoded alone, it would lose its leading space in some models.

        An answer that stands apart is its words, or the name of its class, behind one space.
        """
        if self.answers.apart:
            return self.answers.said(new)
        before, text = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in (list(row), [*row, *new])
        )
        return text[len(before) :]
