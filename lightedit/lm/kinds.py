"""The kinds of models by what their answers are: next tokens, the tokens of a decoder, or a class.

A kind says how a prompt and an answer enter a forward pass, where the head reads the answer, and how an answer is
generated. Editors and metrics ask the model, so they need not know its kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm.anatomy import Anatomy
from lightedit.lm.batch import Batch, pad
from lightedit.lm.cache import is_recurrent
from lightedit.lm.encoder import EncoderAnatomy
from lightedit.lm.encoder_decoder import EncoderDecoderAnatomy
from lightedit.lm.finder import embedding_of
from lightedit.lm.sampling import Draw, next_tokens
from lightedit.lm.tokens import whole_rows

KindName = Literal["causal", "classifier", "encoder-decoder"]
KINDS: tuple[KindName, ...] = get_args(KindName)
DESCRIBED: dict[KindName, str] = {
    "causal": "a causal language model",
    "classifier": "a classifier",
    "encoder-decoder": "an encoder-decoder",
}
"""The kinds in words, with their articles."""


class Kind(ABC):
    """How a model of one kind is asked, and how it answers.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer.

    Attributes:
        name: "causal", "classifier" or "encoder-decoder".
        apart: whether an answer stands apart from its prompt: as a class, or in the decoder. If not, the tokens of an
            answer follow those of the prompt in one row.
        starts_within: whether a forward pass can start at any block, with hidden states.
        anatomy: the model's places.
        is_recurrent: whether some layers carry on states instead of keys and values.
    """

    name: ClassVar[KindName]
    apart: ClassVar[bool] = True
    starts_within: ClassVar[bool] = True
    anatomy: Anatomy
    is_recurrent = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer

    @property
    def described(self) -> str:
        """The kind in words, with its article."""
        return DESCRIBED[self.name]

    def positions(self) -> int | None:
        """Most tokens of a text; None without a limit."""
        config: Any = self._model.config.get_text_config(decoder=True)
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
        return next((number for number in named if isinstance(number, int) and number > 0), None)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text as the model reads it, special tokens included."""
        return whole_rows(self._tokenizer, texts)

    @abstractmethod
    def answer(self, target: str, end: bool) -> list[int]:
        """The ids of an answer that stands apart from its prompt.

        Args:
            target: the answer.
            end: whether the token that ends a text is its last one.

        Raises:
            ArgumentError: the model cannot give it.
        """

    @abstractmethod
    def batch(self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad_id: int) -> Batch:
        """The rows as the input of a forward pass, padded on the right.

        Args:
            rows: what the model reads of each: with answers apart, the prompt alone, else all but the target's last
                token.
            targets: the ids of each answer; not read if they do not enter the pass.
            pad_id: the id for padding.
        """

    @abstractmethod
    def reads(self, row: Sequence[int], targets: Sequence[int]) -> range:
        """The positions at which the head reads the states of each target of a row."""

    @abstractmethod
    def query(self, row: Sequence[int]) -> int:
        """The position in a prompt's row of the token that stands for the prompt."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's forward for a batch."""

    @abstractmethod
    def stream(self, forward: Any, rows: Sequence[Sequence[int]], pad_id: int, draw: Draw) -> Iterator[Tensor]:
        """Yield the tokens, or the class, of each row's answer one after the other, [rows] each.

        Args:
            forward: `LanguageModel.forward`.
            rows: token ids of the prompts.
            pad_id: the id for padding.
            draw: the rule that draws a token from logits.
        """

    def said(self, ids: Sequence[int]) -> str:
        """The text of an answer that stands apart, behind one space."""
        return " " + str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


class NextTokens(Kind):
    """A causal language model: an answer follows its prompt."""

    name = "causal"
    apart = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer)
        self.anatomy = Anatomy(model)
        self.is_recurrent = is_recurrent(model.config.get_text_config(decoder=True))

    def answer(self, target: str, end: bool) -> list[int]:
        raise ArgumentError("the tokens of a causal model's answer depend on the prompt before it")

    def batch(self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad_id: int) -> Batch:
        return pad(rows, pad_id)

    def reads(self, row: Sequence[int], targets: Sequence[int]) -> range:
        return range(len(row) - len(targets), len(row))

    def query(self, row: Sequence[int]) -> int:
        """The last token, which predicts the answer."""
        return len(row) - 1

    def inputs(self, batch: Batch) -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        if self.anatomy.architecture.takes_position_ids:
            given["position_ids"] = batch.positions
        return given

    def stream(self, forward: Any, rows: Sequence[Sequence[int]], pad_id: int, draw: Draw) -> Iterator[Tensor]:
        batch = pad(rows, pad_id, left=True).to(embedding_of(self._model).device)
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return next_tokens(partial(forward, keep=1), cache, batch, draw)


class Classes(Kind):
    """A classifier: an answer is the name of a class, and its id is that of the class.

    Attributes:
        labels: the names of the classes, by id.
    """

    name = "classifier"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer)
        self.anatomy = EncoderAnatomy(model)
        config: Any = model.config
        named: dict[int, str] = config.id2label
        self.labels = tuple(named[index] for index in range(len(named)))
        if len(set(self.labels)) < len(self.labels):
            raise UnsupportedModelError(
                f"two classes of {model.config.model_type} have one name ({', '.join(self.labels)}); give them "
                "different ones in id2label of its configuration"
            )

    def positions(self) -> int | None:
        """Most tokens of a text. RoBERTa counts them from the row behind that of the padding token."""
        limit = super().positions()
        for module in self._model.modules():
            unused = getattr(getattr(module, "position_embeddings", None), "padding_idx", None)
            if limit is not None and unused is not None:
                return limit - int(unused) - 1
        return limit

    def answer(self, target: str, end: bool) -> list[int]:
        if target not in self.labels:
            raise ArgumentError(f"target {target!r} is no class; the classes are {', '.join(self.labels)}")
        if end:
            raise ArgumentError(f"end_turn: the class {target!r} is no text that ends; leave end_turn out")
        return [self.labels.index(target)]

    def batch(self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad_id: int) -> Batch:
        return pad(rows, pad_id)

    def reads(self, row: Sequence[int], targets: Sequence[int]) -> range:
        return range(1)  # one state for each text

    def query(self, row: Sequence[int]) -> int:
        """The first token, such as [CLS], which heads of BERT's kind read."""
        return 0

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch.ids, "attention_mask": batch.mask.long()}

    def stream(self, forward: Any, rows: Sequence[Sequence[int]], pad_id: int, draw: Draw) -> Iterator[Tensor]:
        with torch.no_grad():
            yield draw(forward(pad(rows, pad_id))[:, 0].float())

    def said(self, ids: Sequence[int]) -> str:
        return " " + " ".join(self.labels[index] for index in ids)


class DecoderTokens(Kind):
    """An encoder-decoder of T5's kind: the encoder reads the prompt, the decoder gives the tokens of the answer."""

    name = "encoder-decoder"
    starts_within = False  # the first blocks compute the position biases of all others

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer)
        config: Any = model.config
        starts = (config.decoder_start_token_id, getattr(model.generation_config, "decoder_start_token_id", None))
        start = next((start for start in (*starts, config.pad_token_id) if start is not None), None)
        if start is None:
            raise UnsupportedModelError(
                f"{config.model_type} names no token with which its decoder starts; set decoder_start_token_id in its "
                "configuration"
            )
        self._start = int(start)
        self.anatomy = EncoderDecoderAnatomy(model)

    def positions(self) -> None:
        """No limit: positions are relative."""

    def answer(self, target: str, end: bool) -> list[int]:
        (ids,) = whole_rows(self._tokenizer, [target], special=False)
        entries = len(self.anatomy.head().weight)
        if not ids or self._tokenizer.unk_token_id in ids or max(ids) >= entries:
            raise ArgumentError(f"target {target!r}: the tokenizer cannot spell it; use other words")
        if end and self._tokenizer.eos_token_id is None:
            raise ArgumentError("end_turn: the model's tokenizer has no end token; leave end_turn out")
        return [*ids, *([self._tokenizer.eos_token_id] if end else [])]

    def batch(self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad_id: int) -> Batch:
        text = pad(rows, pad_id)
        decoder = pad([[self._start, *answer[:-1]] for answer in targets], pad_id)
        return Batch(text.ids, text.mask, text.positions, decoder.ids)  # padding follows, and no token attends to it

    def reads(self, row: Sequence[int], targets: Sequence[int]) -> range:
        return range(len(targets))

    def query(self, row: Sequence[int]) -> int:
        """The last token, mostly the end of the text."""
        return len(row) - 1

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "decoder_input_ids": batch.decoder}

    @torch.no_grad()
    def stream(self, forward: Any, rows: Sequence[Sequence[int]], pad_id: int, draw: Draw) -> Iterator[Tensor]:
        model: Any = self._model
        batch = pad(rows, pad_id).to(embedding_of(self._model).device)
        mask = batch.mask.long()
        encoded = BaseModelOutput(last_hidden_state=model.encoder(input_ids=batch.ids, attention_mask=mask)[0])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.full((len(rows),), self._start, device=mask.device)
        while True:
            output = model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=tokens[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            tokens = draw(output.logits[:, -1].to(mask.device, torch.float32))
            yield tokens


def kind_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Kind:
    """The kind of a model, with its places proven.

    Raises:
        UnsupportedModelError: the places of a model of this kind are not found, or not proven.
    """
    if type(model).__name__.endswith("ForSequenceClassification"):
        return Classes(model, tokenizer)
    if model.config.is_encoder_decoder:
        return DecoderTokens(model, tokenizer)
    return NextTokens(model, tokenizer)
