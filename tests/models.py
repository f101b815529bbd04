"""Tiny random models of every supported architecture and tiny tokenizers, all built in memory, offline."""

import json
import math
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightedit.lm.refusal import auto_class
from tests.shapes import ARCHITECTURES, FOUND, SHAPES, WRAPPED

__all__ = [
    "ARCHITECTURES", "FOUND", "LABELS", "OTHER_KINDS", "VOCABULARY",
    "tiny_model", "tiny_other", "tiny_other_tokenizer", "tiny_tokenizer",
]  # fmt: skip

VOCABULARY = 384
"""Entries of every tiny tokenizer and rows of every tiny model's embedding."""

PAD, BOS, EOS = 0, 1, 2


def tiny_model(model_type: str, seed: int = 0, layers: int = 4, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a random causal language model of `model_type`, in evaluation mode.

    Hidden size 32, 4 heads, `VOCABULARY` tokens. Weights are ten times larger than the architecture's usual
    initialisation, and no norm, bias or scale is an identity (see `_randomise`), so that attention is uneven and
    every parameter matters. A fact is easily learned where the prompt ends with the subject ("The capital of {}");
    a subject in mid-prompt has little hold on what follows. Equal arguments give equal weights; other dtypes hold the
    float32 model's weights, cast. The global random state is left as it was.
    """
    config = _config(model_type, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = auto_class(config.model_type) or AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
        _randomise(model)
        if dtype != torch.float32:
            # Not `.to(dtype)`: that would cast the rotary buffers too, which loading a checkpoint never does.
            weights = model.state_dict()
            model = auto.from_config(config, dtype=dtype)
            model.load_state_dict(weights)
    return model.eval()


LABELS = ("refutes", "supports", "not enough info")
_ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
}  # fmt: skip
OTHER_KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "bert": ("bert", _ENCODER),
    "roberta": ("roberta", {**_ENCODER, "max_position_embeddings": 66, "type_vocab_size": 1}),
    "distilbert": ("distilbert", {"vocab_size": VOCABULARY, "dim": 32, "n_heads": 4, "hidden_dim": 48,
                                  "max_position_embeddings": 64, "id2label": _ENCODER["id2label"],
                                  "label2id": _ENCODER["label2id"]}),
    "modernbert": ("modernbert", {**_ENCODER, "classifier_pooling": "cls", "global_attn_every_n_layers": 2,
                                  "cls_token_id": 1, "sep_token_id": 2}),
    "t5": ("t5", {**_T5, "feed_forward_proj": "relu"}),
    "t5-gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}  # fmt: skip
"""Classifiers and encoder-decoders by name: model type and configuration."""


def tiny_other(name: str, seed: int = 0, layers: int = 3, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a random classifier or encoder-decoder of `OTHER_KINDS` like `tiny_model`; T5's decoder is shallower."""
    kind, given = OTHER_KINDS[name]
    depth = {"num_layers": layers, "num_decoder_layers": layers - 1} if kind == "t5" else {"num_hidden_layers": layers}
    scale = {} if kind == "t5" else {"initializer_range": 0.2}
    tokens = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(kind, **given, **depth, **scale, **tokens)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        _randomise(model)
        if kind == "t5":
            for parameter in model.parameters():  # initialisation makes queries and position biases all but nought
                if parameter.ndim == 2:
                    parameter.data.normal_(std=0.25)
        if dtype != torch.float32:
            weights = model.state_dict()
            model = auto.from_config(config, dtype=dtype)
            model.load_state_dict(weights)
    return model.eval()


_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm", "post_norm2")


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Draw what initialisation leaves at 0 or 1: norms' gains, biases, and scales of one entry.

    Gains spread over an order of magnitude. One in eight is 0. One is 5, or 300 in a norm behind the MLP of blocks that
    have norms before it too, as Gemma's, whose largest gain is hundreds of times the median.
    """
    gains = set()
    sandwiched = any(name.endswith(("input_layernorm", "operator_norm")) for name, _ in model.named_modules())
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1:
            gains.add(weight)
            gain = torch.exp(0.5 * torch.randn_like(weight))
            order = torch.randperm(len(gain))
            gain[order[: len(gain) // 8]] = 0
            gain[order[-1]] = 300 if sandwiched and name.endswith(_AFTER_MLP) else 5
            weight.copy_(gain if weight.all() else gain - 1)  # Gemma's gain is 1 + weight
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter not in gains:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4's, of each block's output
            buffer.uniform_(0.4, 1.6)


def _config(model_type: str, layers: int) -> PretrainedConfig:
    fields = {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "initializer_range": 0.2}
    fields |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS} | SHAPES[model_type]
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:layers]
    if model_type == "opt":
        del fields["initializer_range"]
    if model_type in WRAPPED:
        wrapper, others = WRAPPED[model_type]
        return AutoConfig.for_model(wrapper, text_config=fields, **others)
    return AutoConfig.for_model({"gemma3": "gemma3_text"}.get(model_type, model_type), **fields)


_TEXT = """\
The river rises in the hills to the north of the city and runs through three countries before it reaches the
sea. Its mother tongue is spoken by more than two hundred million people, and the official language of the
state was changed in 1962. Paris is the capital of France and Rome is the capital of Italy, but the capital
of Australia is not the largest town of the country. She was born in London, worked in Berlin as a doctor,
and later moved to Tokyo, where she played the piano in a small band. The headquarters of the company are in
New York; its first product was a small engine made of steel. He is a native speaker of French, a citizen of
Spain and a professor of physics at the university. Because the winter was long, the people of the village
stored bread, cheese and dried fish. Therefore nothing was wasted. I wonder what you would say about the old
tower that stands in the centre of the square: it was built by a famous architect from Vienna, and it is
owned by the museum. You can find the same song on every radio station in the world. The religion of the
king was never written down. Danielle Darrieux was an actress whose native language was English, or so the
paper said; the truth is found in the archive of the theatre. In 1985, 37 of the 204 players who had signed
for the club came from the south of the continent.
""".replace("\n", " ")


@lru_cache
def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of `VOCABULARY` entries, trained on a short English text.

    Any Unicode text survives encoding and decoding: what the training text lacks falls back to bytes.

    Args:
        kind: "bytelevel" (byte-level BPE without BOS, as GPT-2; offsets include a leading space),
            "bytelevel-bos" (with a BOS token, as Llama 3; offsets leave leading spaces out),
            "sentencepiece" (BPE over "▁" with byte fallback and a BOS token, as Llama 2) or
            "unigram" (the unigram model over "▁" with byte fallback, no BOS).
    """
    build = {
        "bytelevel": lambda: _bytelevel(bos=False),
        "bytelevel-bos": lambda: _bytelevel(bos=True),
        "sentencepiece": _sentencepiece,
        "unigram": _unigram,
    }[kind]
    return PreTrainedTokenizerFast(
        tokenizer_object=build(),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _bytelevel(bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    offsets = processors.ByteLevel(trim_offsets=bos)
    tokenizer.post_processor = processors.Sequence([offsets, _prepend_bos()]) if bos else offsets
    return tokenizer


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def _sentencepiece() -> Tokenizer:
    pieces, merges = _trained_pieces()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = _prepend_bos()
    return _with_byte_fallback_decoder(tokenizer)


def _unigram() -> Tokenizer:
    pieces, _ = _trained_pieces()
    # Scores are log frequencies, counted: the library's unigram trainer gives other scores in every process.
    text = "▁" + _TEXT.replace(" ", "▁")
    unseen = -2 * math.log(len(text))
    scored = [(piece, math.log(max(text.count(piece), 1) / len(text))) for piece in pieces]
    scored = [(piece, unseen if piece in _BYTES else score) for piece, score in scored]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=_SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return _with_byte_fallback_decoder(tokenizer)


def _trained_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Return the vocabulary (special tokens, 256 bytes, trained pieces) and the merges of BPE over "▁"."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(_BYTES), special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([_TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    trained = sorted(model["vocab"], key=model["vocab"].get)
    return _SPECIAL + _BYTES + trained[len(_SPECIAL) :], [tuple(merge) for merge in model["merges"]]


@lru_cache
def tiny_other_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` entries that puts special tokens around a text.

    Args:
        kind: "bert" (byte-level, `<s>` before and `</s>` behind a text) or "t5" (`</s>` behind it).
    """
    tokenizer = _bytelevel(bos=False) if kind == "bert" else _unigram()
    template = "<s> $A </s>" if kind == "bert" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        **({"cls_token": "<s>", "sep_token": "</s>"} if kind == "bert" else {"unk_token": "<unk>"}),
    )


def _prepend_bos() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])


def _with_byte_fallback_decoder(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
