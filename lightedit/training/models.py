"""Small models of other kinds than causal: a classifier on an encoder's folder, and a T5 made from data alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lightedit.data.examples import Example
from lightedit.errors import ArgumentError, MissingFileError
from lightedit.files import whole_folder
from lightedit.lm import LanguageModel
from lightedit.lm.loading import save_pretrained
from lightedit.lm.tokens import whole_rows
from lightedit.runs.folder import remove_run
from lightedit.training.fitting import Fitted, Item, fit
from lightedit.training.settings import TrainingSettings

_DEFAULTS = TrainingSettings()
_RECORD = "training.json"
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class T5Size:
    """Sizes of a T5 of version 1.1: gated GELU, an LM head of its own.

    Attributes:
        layers: blocks of the encoder, and of the decoder.
        d_model: width of the residual stream.
        d_ff: width of the MLPs.
        heads: attention heads, of d_model / heads numbers each.
        vocabulary: most tokens of the tokenizer, which is trained on the examples' texts.

    Raises:
        ArgumentError: a value is out of range.
    """

    layers: int = 4
    d_model: int = 192
    d_ff: int = 512
    heads: int = 6
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        if min(self.layers, self.d_model, self.d_ff, self.heads) < 1 or self.d_model % self.heads:
            raise ArgumentError(
                "layers, d_model, d_ff and heads must be at least 1, and heads divide d_model, got "
                f"{self.layers}, {self.d_model}, {self.d_ff} and {self.heads}"
            )
        if self.vocabulary < 300:
            raise ArgumentError(f"vocabulary: got {self.vocabulary}, expected at least 300, for all bytes")


def train_classifier(
    encoder: str | Path,
    examples: Sequence[Example],
    out: str | Path,
    *,
    settings: TrainingSettings = _DEFAULTS,
) -> tuple[LanguageModel, Fitted]:
    """Put a classification head on an encoder, and train both on texts with their classes.

    A training that was interrupted goes on after its last kept epoch if it is called again.

        lm, fitted = le.train_classifier("all-MiniLM-L6-v2", le.read_examples("claims.json"), "classifier")

    Args:
        encoder: the folder, or Hub id, of an encoder such as BERT, or of a classifier whose head is replaced.
        examples: the examples; their answers are the names of the classes.
        out: path of the new folder, a plain transformers model that `LanguageModel.load` loads.
        settings: how it is trained.

    Returns:
        The model as it was saved, and what the training gave.

    Raises:
        ArgumentError: `out` exists, or the examples have one class only.
        ResumeError: the folder of an interrupted training, `out` + ".run", does not fit.
        MissingFileError: `encoder` is a folder without a model.
        UnsupportedModelError: the encoder's places are not found.
    """
    folder = _new_folder(out)
    labels = sorted({example.answer for example in examples})
    if len(labels) < 2:
        raise ArgumentError(f"the examples have {len(labels)} class; give examples of at least two")
    if Path(encoder).is_dir() and not (Path(encoder) / "config.json").is_file():
        raise MissingFileError(f"{encoder} is a folder without a config.json; a model folder has one")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(encoder), trust_remote_code=False)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            str(encoder),
            dtype=torch.float32,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    lm = LanguageModel(model, tokenizer, str(encoder))  # proves its places before the work
    longest = min(settings.most_tokens, lm.positions or settings.most_tokens)
    rows = _cut(whole_rows(tokenizer, [example.text for example in examples]), longest)
    items = [Item(row, [labels.index(example.answer)]) for row, example in zip(rows, examples, strict=True)]
    return _trained(model, tokenizer, items, settings.filled(4, 5e-5), folder)


def train_t5(
    examples: Sequence[Example],
    out: str | Path,
    *,
    size: T5Size | None = None,
    settings: TrainingSettings = _DEFAULTS,
) -> tuple[LanguageModel, Fitted]:
    """Make a small T5 with a tokenizer of its own, and train it from the start on texts with their answers.

    Rephrasings are trained with the answer of their example. Nothing is downloaded. A training that was interrupted
    goes on as that of `train_classifier`.

    Args:
        examples: the examples.
        out: path of the new folder, a plain transformers model that `LanguageModel.load` loads.
        size: its sizes.
        settings: how it is trained.

    Returns:
        The model as it was saved, and what the training gave.

    Raises:
        ArgumentError: `out` exists, or there are no examples.
        ResumeError: the folder of an interrupted training, `out` + ".run", does not fit.
    """
    folder, size = _new_folder(out), size or T5Size()
    if not examples:
        raise ArgumentError("examples: the list is empty; give some to train on")
    pairs = [(text, each.answer) for each in examples for text in (each.text, *each.rephrasings)]
    tokenizer = byte_tokenizer([word for pair in pairs for word in pair], size.vocabulary)
    fields: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        d_model=size.d_model,
        d_kv=size.d_model // size.heads,
        d_ff=size.d_ff,
        num_heads=size.heads,
        num_layers=size.layers,
        num_decoder_layers=size.layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = T5ForConditionalGeneration(T5Config(**fields))
    rows = _cut(whole_rows(tokenizer, [text for text, _ in pairs]), settings.most_tokens)
    answers = whole_rows(tokenizer, [answer for _, answer in pairs])
    items = [Item(row, answer) for row, answer in zip(rows, answers, strict=True)]
    return _trained(model, tokenizer, items, settings.filled(60, 1e-3), folder)


def byte_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts, which puts the end token behind each text as T5's does.

    Words are the same tokens at the beginning of a text and within it. Equal texts give equal tokenizers.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _END, _UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def _cut(rows: Sequence[list[int]], longest: int) -> list[list[int]]:
    """Rows of at most `longest` tokens; the special token at the end stays."""
    return [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]


def _new_folder(out: str | Path) -> Path:
    if Path(out).exists():
        raise ArgumentError(f"{out} exists already; name a new folder for the model")
    return Path(out)


def _trained(
    model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], settings: TrainingSettings, folder: Path
) -> tuple[LanguageModel, Fitted]:
    """Train the model, and save it with what the training gave."""
    run = run_folder(folder)
    fitted = fit(model, items, settings, f"training {folder.name}", run)
    with whole_folder(folder) as unfinished:
        save_pretrained(model, tokenizer, unfinished)
        record = {
            "settings": asdict(settings),
            "examples": len(items),
            "trained": fitted.trained,
            "held_out": fitted.held_out,
            "epochs": [epoch._asdict() for epoch in fitted.epochs],
        }
        (unfinished / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    remove_run(run)
    return LanguageModel.load(folder), fitted


def run_folder(out: Path) -> Path:
    """The folder from which an interrupted training of the model in `out` resumes."""
    return out.with_name(out.name + ".run")
