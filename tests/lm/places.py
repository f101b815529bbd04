"""Tiny models of every architecture, Falcon's forms beside it, and their places; for tests."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig

from lightedit.lm import LanguageModel, Place
from tests.models import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer

ROWS = [[5, 60, 70, 8], [9], [30, 31, 32, 33, 34, 35, 36]]
LAYER = 1
FALCONS = {  # every form of its one matrix for q, k and v
    "falcon-multi-query": {"multi_query": True},
    "falcon-plain": {"multi_query": False},
    "falcon-grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-grouped-alone": {"new_decoder_architecture": True, "num_kv_heads": 1},
}
MODELS = [*ARCHITECTURES, *FALCONS]


def language_model(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    if name not in FALCONS:
        return LanguageModel(tiny_model(name, dtype=dtype), tiny_tokenizer("bytelevel"))
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_hidden_size=80,
        bias=True,
        initializer_range=0.2,
        **FALCONS[name],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return LanguageModel(model, tiny_tokenizer("bytelevel"))


def places(lm: LanguageModel, *without: str) -> list[Place]:
    return [Place(0 if n == "embedding" else LAYER, n) for n in lm.architecture.names if n not in without]


def matrices(lm: LanguageModel) -> list[Place]:
    return places(lm, "embedding", "attention", "block")


def whole_weight(module: nn.Module) -> Tensor:
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def rows_of(lm: LanguageModel, place: Place) -> Tensor:
    """The place's rows of its module's weight."""
    every = torch.arange(len(whole_weight(lm.module(place))))
    features = lm.anatomy.features(place)
    return every if features is None else every[features]
