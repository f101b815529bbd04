"""Text as token windows: from a file, from a data set, or self-generated."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import DynamicCache

from lightedit.errors import ArgumentError, MissingFileError, MissingPackageError, UnavailableError
from lightedit.lm import LanguageModel
from lightedit.lm.batch import pad
from lightedit.lm.sampling import SharedDraws, next_tokens
from lightedit.progress import progress

_TEXTS_AT_ONCE = 64  # tokenised together: enough for the tokenizer's threads, and few enough to read lazily
_ROWS = 128  # windows generated together


def read_texts(source: str | Path) -> Iterator[str]:
    """Read the texts of a local file, or stream those of a Hub data set.

    Args:
        source: a `.txt` file, whose texts are separated by blank lines; or a data set "name" or "name:configuration",
            such as "wikitext:wikitext-103-raw-v1". Of a data set, the column "text" of the split "train" is read.

    Raises:
        MissingFileError: there is no such file.
        ArgumentError: the file is not UTF-8, or the data set has no column "text".
        MissingPackageError: `source` is a data set, and `datasets` is not installed.
        RuntimeError: the data set could not be opened.
    """
    path = Path(source)
    if path.is_file():
        return _paragraphs(path)
    if isinstance(source, Path) or path.suffix == ".txt" or path.is_absolute() or source.startswith("."):
        raise MissingFileError(f"no text file at {source}")
    return _streamed(source)


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in chain(file, [""]):
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines)
                    lines = []
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def _streamed(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackageError(
            f"{source!r} is no file, and reading a data set needs `datasets`: pip install 'lightedit[data]'"
        ) from error
    name, _, configuration = source.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # the library raises many different classes
        raise UnavailableError(
            f"{source!r} is no file, and could not be opened as a data set ({type(error).__name__}: {error}); "
            'give a local .txt file, or "name:configuration" of a data set that can be reached'
        ) from error
    if rows.column_names is not None and "text" not in rows.column_names:
        raise ArgumentError(f"the data set {source!r} has no column 'text', only {', '.join(rows.column_names)}")
    return (row["text"] for row in rows)


def token_windows(lm: LanguageModel, texts: Iterable[str], tokens: int, length: int) -> list[list[int]]:
    """Cut texts, joined by blank lines, into windows of `length` tokens.

    A window starts with the beginning-of-text token if the tokenizer puts one before a text. The windows hold `tokens`
    tokens in all, so the last one may be shorter. They hold fewer only if the texts do.

    Raises:
        ArgumentError: `length` is more than the model's positions, or the texts hold a token without a row in its
            embedding.
    """
    encoded = lm.encode(["a"])[0]
    begin = encoded[:1] if encoded[0] == lm.tokenizer.bos_token_id else []
    stream = _token_stream(lm, texts)
    windows: list[list[int]] = []
    left = tokens
    while left > 0 and (window := list(islice(stream, max(1, min(length, left) - len(begin))))):
        windows.append(begin + window)
        left -= len(windows[-1])
    lm.check_rows(windows)
    return windows


def _token_stream(lm: LanguageModel, texts: Iterable[str]) -> Iterator[int]:
    stripped = (text.strip() for text in texts)
    filled = (f"{text}\n\n" for text in stripped if text)
    while group := list(islice(filled, _TEXTS_AT_ONCE)):
        # verbose=False: no warning of texts longer than the model's context, which are cut into windows
        encoding = lm.tokenizer(group, add_special_tokens=False, verbose=False)
        yield from chain.from_iterable(encoding["input_ids"])


def write_texts(
    lm: LanguageModel, tokens: int, length: int, seed: int = 0, top_k: int = 50, progress_bar: bool = True
) -> list[list[int]]:
    """Generate windows of `length` tokens from the text-start token, by top-k sampling.

    An end-of-text token does not end a window; the model's next text follows it.

    Returns:
        The smallest number of windows that hold `tokens` tokens, text-start tokens included.

    Raises:
        ArgumentError: the model cannot run windows of this length, or has no row for the text-start token.
    """
    lm.check_rows([[lm.text_start]], length)
    count = -(-tokens // length)
    batches = -(-count // _ROWS)
    # Draw among the top k alone: torch's draw over the whole vocabulary would take a third of the time
    draw = SharedDraws(torch.Generator(lm.device).manual_seed(seed), top_k, whole_vocabulary=False)
    windows: list[list[int]] = []
    with progress("sampling text", progress_bar) as report:
        for index in range(batches):
            rows = count // batches + (index < count % batches)
            start = pad([[lm.text_start]] * rows, lm.pad_id).to(lm.device)
            columns = [start.ids[:, 0]]
            stream = next_tokens(lm.forward, DynamicCache(config=lm.model.config), start, draw)
            for drawn in islice(stream, length - 1):
                columns.append(drawn)
                report(len(windows) * length + rows * len(columns), count * length)
            windows += torch.stack(columns, 1).tolist()
    return windows


class TextDataModule(LightningDataModule):
    """Gives token windows to a trainer's predict loop, as `Batch`es padded on the right.

    Args:
        windows: token ids of each window.
        pad_id: token id for padding, which is masked.
        max_tokens: tokens of one batch at most, padding included, unless a single window is longer.
    """

    def __init__(self, windows: Sequence[list[int]], pad_id: int, max_tokens: int = 4096) -> None:
        super().__init__()
        self.windows, self.pad_id, self.max_tokens = windows, pad_id, max_tokens

    def predict_dataloader(self) -> DataLoader[list[int]]:
        rows = max(1, self.max_tokens // max(map(len, self.windows)))
        return DataLoader(self.windows, batch_size=rows, collate_fn=partial(pad, pad_id=self.pad_id))  # type: ignore[arg-type]
