"""Refuse a model that cannot be edited from its configuration alone, before its weights are loaded."""

import copy
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lightedit.errors import UnsupportedModelError
from lightedit.lm.architectures import ARCHITECTURES
from lightedit.lm.finder import structure_of

# Dense types that pass the parity suite, as tests/models.py builds them. Others are found and proven at load alike.
PROVEN = (
    *("apertus", "arcee", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "ctrl", "cwm"),
    *("diffllama", "doge", "ernie4_5", "exaone4", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3"),
    *("gemma3_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "got_ocr2", "gpt2", "gpt_bigcode"),
    *("gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "granite_swa", "granitemoehybrid"),
    *("helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "lfm2", "lfm3"),
    *("llama", "llava", "minicpm3", "ministral", "ministral3", "mistral", "mistral3", "modernbert-decoder"),
    *("mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "opt", "persimmon", "phi"),
    *("phi3", "qwen2", "qwen3", "qwen3_5_text", "qwen3_vl", "seed_oss", "smollm3", "stablelm", "starcoder2"),
    *("vaultgemma", "xglm", "youtu"),
)

OWN_MODEL = "load it yourself with trust_remote_code=True and call le.LanguageModel(model, tokenizer)"
"""The way out for custom code."""


def auto_class(model_type: str) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText] | None:
    """The class that loads models of this type; None for a type that writes no text."""
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else None


_OTHER = "is an encoder-decoder; expected a causal language model (decoder-only), or T5"
_T5 = ("t5", "mt5", "umt5")


def class_of_kind(fields: dict[str, Any]) -> Any:
    """The class that loads a classifier or an encoder-decoder of T5's kind; None for what should be a causal model.

    Args:
        fields: the entries of a config.json.
    """
    if any(str(name).endswith("ForSequenceClassification") for name in fields.get("architectures") or ()):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if fields.get("model_type") in _T5 else None


def check_config(fields: dict[str, Any]) -> None:
    """Refuse what the entries of a config.json show to be beyond editing.

    That is custom code, about which transformers would ask on the terminal, and all but dense causal language models.

    Raises:
        UnsupportedModelError: says why, and what to do.
    """
    kind = fields.get("model_type") or "a config.json without model_type"
    if auto_class(kind) is not None:
        check_structure(CONFIG_MAPPING[kind].from_dict(fields))
        return
    if "auto_map" in fields:
        raise UnsupportedModelError(
            f"{kind} comes as custom code ({fields['auto_map'].get('AutoModelForCausalLM', 'no causal model')}), which "
            f"lightedit does not run by itself; {OWN_MODEL}"
        )
    if fields.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{kind} {_OTHER}")
    known = "no causal language model" if kind in CONFIG_MAPPING else "unknown to this version of transformers"
    raise UnsupportedModelError(f"{kind} is {known}; expected a causal language model (decoder-only)")


def check_structure(config: PretrainedConfig) -> None:
    """Refuse encoders, mixtures of experts, mixed blocks, and blocks with more than one MLP.

    The model is built without weights, so this takes well below a second.

    Raises:
        UnsupportedModelError: says what was expected and found.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind} {_OTHER}")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder; expected a causal language model (decoder-only), or an encoder with a "
            "classification head, as le.train_classifier makes it"
        )
    if kind in ARCHITECTURES:
        return
    text = config.get_text_config(decoder=True)
    fields = text.to_dict()
    experts = [] if fields.get("is_moe") is False else _experts(fields)  # Doge's default names experts it does not have
    for name, count in experts:
        raise UnsupportedModelError(
            f"{kind} is a mixture of experts ({name} {count}); expected dense blocks, each with one MLP"
        )
    if (model := _without_weights(config)) is not None:
        structure_of(model)


def refusals() -> dict[str, str]:
    """The causal types of this version of transformers that are refused in their default configuration, and why.

    A type of `PROVEN` is not among them: gemma4_text or granitemoehybrid have sizes with and without experts or gates.
    """
    reasons = {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - set(PROVEN)):
        try:
            check_structure(CONFIG_MAPPING[kind]())
        except UnsupportedModelError as error:
            reasons[kind] = str(error).removeprefix(kind).lstrip(": ")
        except Exception:  # some default configurations are not valid
            continue
    return reasons


def _experts(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """The fields that name a number of experts above one."""
    found = []
    for name, value in ((str(key), value) for key, value in fields.items()):
        if isinstance(value, dict):
            found += _experts(value)
        elif name.endswith("experts") and name.startswith(("num_", "n_", "moe_num_")):
            counts = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(count, int) and not isinstance(count, bool) and count > 1 for count in counts):
                found.append((name, value))
    return found


def _without_weights(config: PretrainedConfig) -> PreTrainedModel | None:
    """The model on device "meta"; None if it cannot be built there, in which case loading it shows more."""
    auto = auto_class(config.model_type)
    if auto is None:
        return None
    config = copy.deepcopy(config)
    config.quantization_config = None
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception:
        return None
