"""Places that are found, what proves them, and what is refused."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import lightedit as le
from benchmarks import published
from benchmarks.values import published_value
from lightedit.commands.env import env
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import LanguageModel, Place
from lightedit.lm.architectures import ARCHITECTURES as ROWS
from lightedit.lm.finder import find_architecture
from lightedit.lm.refusal import PROVEN
from lightedit.methods.closed_form.values import optimize_values
from tests.models import ARCHITECTURES, FOUND, tiny_model, tiny_tokenizer

QKV = ("q_proj", "k_proj", "v_proj")


def paths(attention: str, qkv: tuple[str, str, str], out: str, first: list[str], second: str) -> dict[str, str]:
    """Paths inside a block; `first` is the gate, if there is one, and the MLP's first matrix."""
    attended = {name: f"{attention}.{path}" for name, path in zip("qkv", qkv, strict=True)}
    gate = {"mlp_gate": first[0]} if len(first) == 2 else {}
    return attended | {"attention_out": f"{attention}.{out}"} | gate | {"mlp_in": first[-1], "mlp": second}


GATED = ["mlp.gate_proj", "mlp.up_proj"]
LLAMA = le.Architecture("model.embed_tokens", "model.layers", paths("self_attn", QKV, "o_proj", GATED, "mlp.down_proj"))
POST_NORM = replace(LLAMA, mlp_norm="post_feedforward_layernorm")
NEOX = paths("attention", ("query_key_value",) * 3, "dense", ["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h")
BLOOM = le.Architecture(
    "transformer.word_embeddings",
    "transformer.h",
    paths("self_attention", ("query_key_value",) * 3, "dense", ["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h"),
    layout="grouped",
    supports_packing=False,
)
EXPECTED = {
    "bloom": replace(BLOOM, takes_position_ids=False),
    "falcon": BLOOM,
    "gemma2": replace(POST_NORM, supports_packing=False),
    "gemma3": POST_NORM,
    "gpt2": le.Architecture(
        "transformer.wte", "transformer.h", paths("attn", ("c_attn",) * 3, "c_proj", ["mlp.c_fc"], "mlp.c_proj")
    ),
    "gpt_neox": le.Architecture("gpt_neox.embed_in", "gpt_neox.layers", NEOX, layout="grouped"),
    "gptj": le.Architecture(
        "transformer.wte",
        "transformer.h",
        paths("attn", QKV, "out_proj", ["mlp.fc_in"], "mlp.fc_out"),
        supports_packing=False,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "olmo2": POST_NORM,
    "opt": le.Architecture(
        "model.decoder.embed_tokens", "model.decoder.layers", paths("self_attn", QKV, "out_proj", ["fc1"], "fc2")
    ),
    "phi3": replace(
        LLAMA, paths=paths("self_attn", ("qkv_proj",) * 3, "o_proj", ["mlp.gate_up_proj"] * 2, "mlp.down_proj")
    ),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}


def test_the_expected_places_are_those_of_all_architectures() -> None:
    assert EXPECTED.keys() == set(ARCHITECTURES)


def test_the_types_listed_as_proven_are_those_that_are_tested() -> None:
    assert sorted(PROVEN) == sorted({tiny_model(name).config.model_type for name in (*ARCHITECTURES, *FOUND)})


def test_the_listed_refusals_leave_out_what_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    env(models=True)
    printed = capsys.readouterr().out
    assert re.search(r"^73 model types pass.*apertus, .*llama, .*youtu$", printed, re.M | re.S)
    assert re.search(r"^  mixtral +is a mixture of experts \(num_local_experts 8\)", printed, re.M)
    assert re.search(r"^  bert +is an encoder", printed, re.M)
    assert len(re.findall(r"^  \S+ .*expected", printed, re.M)) > 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_places_of_a_model_are_these(architecture: str, dtype: torch.dtype) -> None:
    lm = LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))
    assert lm.architecture == EXPECTED[architecture]
    assert list(lm.architecture.paths.items()) == list(EXPECTED[architecture].paths.items())
    assert lm.anatomy.proof.mlp_scales == (1.0,) * 4
    assert lm.head.scale == 1


# What is refused

EXPERTS = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_next", "gpt_oss", "olmoe", "phimoe", "granitemoe"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "llama4_text", "dbrx", "jamba", "jetmoe", "minimax"),
    *("aria_text", "kimi_linear", "lfm2_moe", "nemotron_h", "longcat_flash", "solar_open", "hy_v3", "flex_olmo"),
]
REFUSED = {
    **dict.fromkeys(EXPERTS, r"is a mixture of experts \(\w+ \d+\)"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "zamba2"), "has no MLP"),
    **dict.fromkeys(("gemma3n_text", "gemma4", "gemma4_text"), "more than one MLP: .*per_layer_projection"),
    **dict.fromkeys(("bert", "roberta", "electra", "xlm"), "is an encoder; expected a causal"),
    **dict.fromkeys(("bart", "marian", "whisper"), "is an encoder-decoder; expected a causal"),
    **dict.fromkeys(("distilbert", "clip"), "is no causal language model"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_be_edited_is_refused_before_its_weights_are_read(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)  # and no weights, nor a tokenizer
    start = time.process_time()
    with pytest.raises(le.UnsupportedModelError, match=f"{model_type}.*{REFUSED[model_type]}") as refusal:
        LanguageModel.load(tmp_path)
    assert time.process_time() - start < 3  # well below a second, but where the type's module is imported first
    assert "\n" not in str(refusal.value)


def test_custom_code_is_refused_without_a_question_and_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}})
    )
    with pytest.raises(
        le.UnsupportedModelError, match=r"mine .*modeling_mine.*trust_remote_code=True.*le\.LanguageModel\(model, tok"
    ):
        LanguageModel.load(tmp_path)


def test_a_tokenizer_of_custom_code_is_refused_in_the_same_way(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}})
    )
    with pytest.raises(le.UnsupportedModelError, match=r"tokenizer of .*custom code.*le\.LanguageModel\("):
        LanguageModel.load(tmp_path)


# Custom classes


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, kind: str = "plain", **rest) -> None:
        self.kind, self.hidden_size, self.num_hidden_layers, self.vocab_size = kind, 16, 3, 384
        super().__init__(**rest)


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: tuple[object, int, Tensor | None]) -> Tensor:
        q, k, v = (states[:, None] for states in self.qkv(x).chunk(3, dim=-1))
        cache, layer, real = memory
        past = 0
        if cache is not None:
            past = cache.get_seq_length(layer)
            k, v = cache.update(k, v, layer)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
        seen = seen if real is None else seen & real[:, None, None].bool()
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0])


class OwnBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attn, self.up, self.down = OwnAttention(), nn.Linear(16, 40), nn.Linear(40, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, memory: tuple[object, int, Tensor | None]) -> Tensor:
        x = x + self.attn(x, memory)
        m = self.down(self.up(self.norm(x)).relu())
        if self.kind == "gated":
            return x + m * x.sigmoid()
        if self.kind == "normed":
            return self.norm(x + m)
        return x - 0.25 * m if self.kind == "scaled" else x + m


class OwnModel(PreTrainedModel):
    """A decoder of the kind that custom code brings: other names, no attention interface, position ids unknown."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(384, 16)
        self.trunk = nn.ModuleList(OwnBlock(config.kind) for _ in range(3))
        self.head = nn.Linear(16, 384, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask=None, past_key_values=None, use_cache=None) -> CausalLMOutput:
        x = self.tokens(input_ids)
        for layer, block in enumerate(self.trunk):
            real = None if self.config.kind == "unmasked" else attention_mask
            x = block(x=x, memory=(past_key_values, layer, real))
        return CausalLMOutput(logits=self.head(x))


def own_model(kind: str) -> OwnModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OwnModel(OwnConfig(kind)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model


@pytest.mark.parametrize(("kind", "scale"), [("plain", 1.0), ("scaled", -0.25)])
def test_the_places_of_a_custom_class_are_found_and_its_values_those_of_a_plain_loop(
    kind: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LanguageModel(own_model(kind), tiny_tokenizer("bytelevel"))
    assert lm.architecture == le.Architecture(
        "tokens", "trunk", {"mlp_in": "up", "mlp": "down"}, takes_position_ids=False, supports_packing=False
    )
    assert lm.anatomy.proof.mlp_scales == pytest.approx((scale,) * 3, rel=1e-5)
    monkeypatch.setitem(published._PLACES, "own", ("trunk", "down"))
    fact, settings = le.Fact("The capital of {}", "France", "Rome"), le.ValueSettings(steps=6)
    for site in ("block", "mlp"):
        found = optimize_values(lm, tokenize_facts(lm.tokenizer, [fact], Contexts()), 1, site, settings).targets[0]
        expected = published_value(lm, fact, Contexts(), 1, site, settings)
        assert expected.delta.norm() > 0.1 * expected.h0.norm()
        torch.testing.assert_close(found, expected.target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gated", "normed"])
def test_a_block_that_changes_what_its_mlp_adds_is_refused(kind: str) -> None:
    with pytest.raises(le.UnsupportedModelError, match=r"own: trunk\.0: .*output of down does not reach the block"):
        LanguageModel(own_model(kind), tiny_tokenizer("bytelevel"))


def test_a_model_that_ignores_the_attention_mask_is_refused() -> None:
    with pytest.raises(le.UnsupportedModelError, match=r"own: a pass from block 1 on.*follows the attention mask"):
        LanguageModel(own_model("unmasked"), tiny_tokenizer("bytelevel"))


def test_a_registered_architecture_is_used_and_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "own", None)  # so that the row goes when the test ends
    model = own_model("plain")
    row = replace(find_architecture(model), paths={"attention_out": "attn.out", "mlp": "down"})
    le.register_architecture("own", row)
    lm = LanguageModel(model, tiny_tokenizer("bytelevel"))
    assert lm.module_name(Place(1, "attention_out")) == "trunk.1.attn.out"
    wrong = {
        r"trunk\.0\.up has 40 outputs; expected as many as the residual stream, 16": {"paths": {"mlp": "up"}},
        r"trunk\.0 has no mlp\.down, which": {"paths": {"mlp": "mlp.down"}},
        r"no list of blocks at 'model\.layers'": {"blocks": "model.layers"},
    }
    for message, fields in wrong.items():
        le.register_architecture("own", replace(row, **fields))
        with pytest.raises(le.UnsupportedModelError, match=message):
            LanguageModel(model, tiny_tokenizer("bytelevel"))
    with pytest.raises(le.LightEditError, match="no path of 'mlp'"):
        le.register_architecture("own", replace(row, paths={"mlp_in": "up"}))
