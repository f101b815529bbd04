"""The language model that is edited: a transformers model and its tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm import hooks
from lightedit.lm.batch import Batch
from lightedit.lm.fingerprint import fingerprint
from lightedit.lm.kinds import Classes, KindName, kind_of
from lightedit.lm.loading import load_pretrained
from lightedit.lm.packed import Span, packed_attention
from lightedit.lm.place import Place
from lightedit.lm.reading import Reading
from lightedit.lm.rowwise import OfEdits, RowwiseEdits
from lightedit.lm.storage import check_storage
from lightedit.lm.text import TextModel
from lightedit.lm.weights import EditedWeights
from lightedit.ops import Head


class LanguageModel(TextModel):
    """A language model whose places (see `Place`) can be read, changed within a context, and edited.

    It is a causal language model, a classifier (an encoder such as BERT with a classification head), or an
    encoder-decoder of T5's kind; see `kind`.

    It is not an `nn.Module`, so a trainer neither moves, wraps nor checkpoints it. A model spread over several devices
    stays as it is.

    Args:
        model: the transformers model; it is put in evaluation mode and frozen.
        tokenizer: its fast tokenizer; subject positions come from character offsets.
        name: its name in provenance.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        name: its name or path.
        fingerprint: short hash of the unedited weights.
        answers: how it is asked, and how it answers.
        anatomy: the modules and matrices of its places.
        blocks: its transformer blocks, first to last.
        reading: where the prompts of forward passes are, for adaptors.
        weights: the changed places and their changes.
        returns_tuple: whether blocks return (hidden, attention weights) rather than the hidden state alone.
        is_recurrent: whether some layers carry on states instead of keys and values.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model") -> None:
        check_storage(model)
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} gives no character offsets, which finding the subject needs; "
                "load the fast tokenizer of this model."
            )
        self.model = model.eval().requires_grad_(False)
        self.answers = kind_of(model, tokenizer)
        self.anatomy = self.answers.anatomy
        self.architecture, self.blocks = self.anatomy.architecture, self.anatomy.blocks
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint(model)
        self.reading = Reading(model)
        self.weights = EditedWeights(self.anatomy, self.reading)
        self.returns_tuple = self.anatomy.proof.returns_tuple
        self.is_recurrent = self.answers.is_recurrent
        self._keeps_logits = "logits_to_keep" in signature(type(model).forward).parameters

    @classmethod
    def load(
        cls,
        name: str | Path,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | dict[str, int | str] | None = None,
    ) -> "LanguageModel":
        """Load the built-in `smollm2`, a Hub id, a local folder or a `.gguf` file.

        The kind of the model follows from its configuration: a classifier if its architecture is one "for sequence
        classification", an encoder-decoder if it is T5's, else a causal language model.

        Args:
            name: what to load.
            dtype: "float32", "bfloat16", "float16" or "auto" (as stored); default: float32 on the CPU, else as stored.
            device: device of the whole model; default: the GPU if there is one.
            device_map: as in transformers, for a model larger than one device; excludes `device`.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ConnectionError: the model is not in the local cache, and the Hub does not answer.
            OSError: the Hub has no such model, or it asks for a token.
            ArgumentError: an unknown dtype, both `device` and `device_map`, or a model of an unsupported architecture.
            RuntimeError: the built-in model could not be downloaded.
        """
        model, tokenizer = load_pretrained(str(name), dtype, device, device_map)
        return cls(model, tokenizer, name=str(name))

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, layers={self.n_layers}, dtype={self.dtype}, device={self.device})"

    @property
    def kind(self) -> KindName:
        """What its answers are: next tokens ("causal"), a class ("classifier"), or those of a decoder."""
        return self.answers.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's classes, by id; empty for other kinds."""
        return self.answers.labels if isinstance(self.answers, Classes) else ()

    @property
    def n_layers(self) -> int:
        """Number of blocks. The blocks of an encoder-decoder are those of the encoder, then those of the decoder."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.anatomy.shape(Place(0))[0]

    @property
    def dtype(self) -> torch.dtype:
        weight = self.module(Place(0)).weight
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype  # of an offloaded matrix too
        return self.weight(Place(0)).dtype

    @property
    def head(self) -> Head:
        """The LM head, or the last matrix of a classification head."""
        return self.anatomy.head()

    def batch(self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Batch:
        """Rows with the answers that are read from them, as the input of a forward pass; see `Kind.batch`."""
        return self.answers.batch(rows, targets, self.pad_id)

    def reads(self, row: Sequence[int], targets: Sequence[int]) -> range:
        """The positions for `before_head` at which each target of a row is predicted."""
        return self.answers.reads(row, targets)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ArgumentError unless `layers` exist and are distinct and ascending."""
        if not layers or list(layers) != sorted(set(layers)):
            raise ArgumentError(f"layers must be distinct and ascending, got {list(layers)}")
        if layers[0] < 0 or layers[-1] >= self.n_layers:
            raise ArgumentError(f"layers {list(layers)} out of range: {self.name} has layers 0 to {self.n_layers - 1}")

    def module(self, place: Place) -> nn.Module:
        """The module whose output is the output of `place`; see `Anatomy.module`."""
        return self.anatomy.module(place)

    def module_name(self, place: Place) -> str:
        """The name of that module, such as "model.layers.5.mlp.down_proj"; see `Anatomy.module_name`."""
        return self.anatomy.module_name(place)

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm between the MLP's output and the residual stream; None if the architecture has none."""
        return self.anatomy.mlp_norm(layer)

    def weight(self, place: Place) -> Tensor:
        """The matrix of `place` as a writable [d_out, d_in] view; see `Anatomy.weight`."""
        return self.anatomy.weight(place)

    def bias(self, place: Place) -> Tensor | None:
        """The bias of `place` as a writable [d_out] view, None without one; see `Anatomy.bias`."""
        return self.anatomy.bias(place)

    def forward(self, batch: Batch, cache: DynamicCache | None = None, keep: int | None = None) -> Tensor:
        """Run one forward pass.

        Args:
            batch: rows of token ids; with a cache, the mask covers prefix and tokens.
            cache: keys and values of earlier tokens, such as a `PrefixCache`.
            keep: number of last tokens whose logits are returned; None for all.

        Returns:
            Logits, [rows, tokens or keep, vocabulary]; those of a classifier are [rows, 1, classes], and those of an
            encoder-decoder [rows, decoder tokens or keep, vocabulary].
        """
        arguments = self.answers.inputs(batch.to(self.device))
        if self.kind != "classifier":
            arguments["use_cache"] = cache is not None
        if cache is not None:
            arguments["past_key_values"] = cache
        if keep is not None and self._keeps_logits:
            arguments["logits_to_keep"] = keep
        logits: Tensor = self.model(**arguments).logits
        logits = logits[:, None] if self.kind == "classifier" else logits
        return logits if keep is None else logits[:, -keep:]

    def forward_packed(self, ids: Tensor, positions: Tensor, spans: list[Span]) -> None:
        """Run one forward pass over the tokens of many rows laid end to end, without padding (see `Span`).

        Args:
            ids: token ids, [tokens].
            positions: position of each token in its row, [tokens].
            spans: the rows, in order.
        """
        with packed_attention(self.model):
            self.model(
                input_ids=ids[None].to(self.device),
                position_ids=positions[None].to(self.device),
                use_cache=False,
                packed=spans,
            )

    # Reading and changing a forward pass

    @contextmanager
    def capture(
        self, places: Iterable[Place], rows: int, at: hooks.At | None = None, inputs: bool = False
    ) -> Iterator[dict[Place, Tensor]]:
        """Within the context, collect the outputs or inputs of `places` in a forward pass.

        Args:
            places: the places to read.
            rows: rows of the batch; 1 for a packed pass.
            at: (rows, positions), integer tensors [n], of the tokens to keep; None keeps all.
            inputs: keep the places' inputs instead of their outputs; the embedding has no such states.

        Yields:
            A dictionary that fills during the pass: place -> [n, d] or [rows, tokens, d], copies.
        """
        ports = {place: self.anatomy.port(place) for place in places}
        if inputs and any(place.name == "embedding" for place in ports):
            raise UnsupportedModelError("token ids enter the embedding, not states; capture what leaves it")
        modules = {place: port.entry if inputs else port.exit for place, port in ports.items()}
        features = {} if inputs else {place: p.features for place, p in ports.items() if p.features is not None}
        with hooks.capture(modules, rows, at, inputs, features) as states:
            yield states

    def add_at(self, place: Place, shift: Tensor, at: hooks.At) -> AbstractContextManager[None]:
        """Within the context, add `shift` [n, d] to the output of `place` at the tokens `at`.

        Several such contexts compose in one pass and apply in the order in which they were entered. The sum is in the
        wider of both dtypes. Gradients flow into `shift`.

        Args:
            place: the place to change.
            shift: the summand, [n, d].
            at: (rows, positions), integer tensors [n]; a token named twice gets both summands.
        """
        return hooks.add_at(self.anatomy.port(place), shift, at)

    def replace_at(self, place: Place, states: Tensor, at: hooks.At) -> AbstractContextManager[None]:
        """Within the context, replace the output of `place` at the distinct tokens `at` by `states` [n, d]."""
        return hooks.replace_at(self.anatomy.port(place), states, at)

    def probe(self, places: Iterable[Place]) -> AbstractContextManager[dict[Place, hooks.Probe]]:
        """Within the context, prepare forward passes for gradients with respect to the outputs of `places`.

        After the backward pass, each probe holds the token factors of the gradient of its place's matrix (see `Probe`).
        The backward pass may follow the context. No weight requires a gradient.
        """
        return hooks.probe({place: self.anatomy.port(place) for place in places})

    @contextmanager
    def before_head(self, rows: int, at: hooks.At) -> Iterator[dict[int, Tensor]]:
        """Within the context, the forward pass ends before the head.

        Args:
            rows: rows of the batch.
            at: (rows, positions), each [n], positions as `reads` gives them: of the row's tokens; of the decoder's; or
                0, for a classifier.

        Yields:
            A dictionary that fills during the pass: 0 -> the input of the LM head at `at`, [n, d].
        """
        head = self.anatomy.head_module()
        with hooks.capture({0: head}, rows, at, inputs=True) as states, hooks.stop_after(head, before=True):
            yield states

    def starting_at(self, layer: int, hidden: Tensor) -> AbstractContextManager[None]:
        """Within the context, forward passes start at block `layer` with input `hidden`. Earlier blocks do not run.

        With a `PrefixCache` of the earlier tokens, `forward(batch, cache)` computes only the tokens of `batch`, in
        blocks from `layer` on. Places in earlier blocks are not reached.

        Args:
            layer: the first block that runs.
            hidden: its input, [rows, tokens, d], without the cached tokens; gradients flow into it.
        """
        return hooks.skip_blocks(self.blocks[:layer], hidden, self.returns_tuple)

    @contextmanager
    def with_edits(self, edits: RowwiseEdits, rectangles: Sequence[tuple[int, int]] | None = None) -> Iterator[None]:
        """Within the context, each row of a forward pass sees its own edit. No weight is written.

        Args:
            edits: the edits, and which of them each row sees.
            rectangles: (rows, length) of each span of a packed pass; by default all rows have one length.
        """

        def adding(update: OfEdits) -> hooks.OutputChange:
            return lambda inputs, output: output + edits.added(inputs, update, rectangles)

        def adapting(place: Place) -> hooks.OutputChange:
            return lambda inputs, output: edits.adapted(inputs, output, place, self.reading.prompts)

        with ExitStack() as stack:
            for place, update in edits.updates.items():
                stack.enter_context(hooks.changed(self.anatomy.port(place), adding(update)))
            if edits.adaptors:
                stack.callback(self.reading.install())
            for place in edits.adaptors:
                stack.enter_context(hooks.changed(self.anatomy.port(place), adapting(place)))
            yield
