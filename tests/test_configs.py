"""Every number of every file in configs/, against the published ones.

Where the numbers come from: ROME (Meng et al., 2022, arXiv 2202.05262), MEMIT (Meng et al., 2023, 2210.07229), EMMET
(Gupta et al., 2024, 2403.14236), PMET (Li et al., 2024, 2308.08742), AlphaEdit (Fang et al., 2025, 2410.02355), ENCORE
(Gupta et al., 2025, 2502.01636), LocFT-BF (2509.22072), MEND (2110.11309), KE (2104.08164), EasyEdit and their
code; those of SmolLM2 are the best of our own sweeps, but for fine-tuning and hyper-networks. Each file's first line
says which it takes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightedit as le
from lightedit.methods import METHODS
from lightedit.methods.closed_form.method import ClosedForm

CONFIGS = Path(__file__).parents[1] / "configs"
FOUND = {str(path.relative_to(CONFIGS).with_suffix("")): path for path in sorted(CONFIGS.glob("*/*.yaml"))}

MODELS = {
    "gpt-j-6b": ("EleutherAI/gpt-j-6b", "bfloat16"),
    "gpt-neox-20b": ("EleutherAI/gpt-neox-20b", "bfloat16"),
    "gpt2-xl": ("openai-community/gpt2-xl", "float32"),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "bfloat16"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "bfloat16"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "bfloat16"),
    "smollm2": ("smollm2", "float32"),
}


def layers(first: int, last: int) -> list[int]:
    return [*range(first, last + 1)]


def values(lr: float, steps: int, clamp: float, kl: float = 0.0625, decay: float = 0.5, **others: Any) -> dict:
    return {
        "lr": lr, "steps": steps, "clamp_norm_factor": clamp, "kl_factor": kl, "weight_decay": decay, **others,
    }  # fmt: skip


def most_probable(steps: int) -> dict:
    return {"stopping": {"extra_steps": steps}}


BELOW = {"max_kl": 0.01, "nll_factor_after": 0.1}
KL_BELOW = {"stopping": BELOW}
KL_BELOW_BY_CLASS = {"stopping": {"class_path": "lightedit.KLBelow", "init_args": BELOW}}

ROME_VALUES = values(0.5, 20, 4.0)
GPT2_VALUES = values(0.5, 20, 0.75)  # MEMIT's for GPT-2 XL
GPTJ_VALUES = values(0.5, 25, 0.75)  # MEMIT's for GPT-J
NEOX_VALUES = values(0.5, 20, 0.3)  # those of MEMIT's paper for GPT-NeoX
PMET_VALUES = values(0.2, 30, 0.75, 1.0, **KL_BELOW)  # PMET's for GPT-J
PMET_NEOX_VALUES = values(0.5, 30, 0.8, 0.8, **KL_BELOW)
PMET_OURS = values(0.5, 30, 4.0, **KL_BELOW_BY_CLASS)

# file -> the method's settings; the method is named by the file
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2-xl/rome": {"layers": [17], "values": ROME_VALUES},
    "gpt2-xl/memit": {"layers": layers(13, 17), "lambda_": 20000.0, "values": GPT2_VALUES},
    "gpt2-xl/emmet": {"layers": [17], "lambda_": 1000.0, "mu": 0.1, "values": GPT2_VALUES},
    "gpt2-xl/pmet": {"layers": layers(13, 17), "lambda_": 6000.0, "values": PMET_VALUES},
    "gpt2-xl/alphaedit": {"layers": layers(13, 17), "threshold": 0.02, "ridge": 10.0, "values": GPT2_VALUES},
    "gpt2-xl/encore": {"layers": layers(13, 17), "lambda_": 20000.0, "norm_weight": 10.0,
                       "values": GPT2_VALUES | most_probable(3)},
    "gpt-j-6b/rome": {"layers": [5], "values": ROME_VALUES},
    "gpt-j-6b/memit": {"layers": layers(3, 8), "lambda_": 15000.0, "values": GPTJ_VALUES},
    "gpt-j-6b/emmet": {"layers": [5], "lambda_": 1.0, "mu": 0.1, "values": GPTJ_VALUES},
    "gpt-j-6b/pmet": {"layers": layers(3, 8), "lambda_": 6000.0, "values": PMET_VALUES},
    "gpt-j-6b/alphaedit": {"layers": layers(3, 8), "threshold": 0.02, "ridge": 10.0, "values": GPTJ_VALUES},
    "gpt-j-6b/encore": {"layers": layers(3, 8), "lambda_": 15000.0, "norm_weight": 10.0,
                        "values": GPTJ_VALUES | most_probable(2)},
    "gpt-neox-20b/rome": {"layers": [15], "values": ROME_VALUES},
    "gpt-neox-20b/memit": {"layers": layers(6, 10), "lambda_": 20000.0, "values": NEOX_VALUES},
    "gpt-neox-20b/emmet": {"layers": [15], "lambda_": 1.0, "mu": 0.1, "values": NEOX_VALUES},
    "gpt-neox-20b/pmet": {"layers": layers(6, 10), "lambda_": 15000.0, "values": PMET_NEOX_VALUES},
    "gpt-neox-20b/alphaedit": {"layers": layers(6, 10), "threshold": 0.02, "ridge": 10.0, "values": NEOX_VALUES},
    "gpt-neox-20b/encore": {"layers": layers(6, 10), "lambda_": 20000.0, "norm_weight": 10.0,
                            "values": NEOX_VALUES | most_probable(2)},
    "llama-2-7b/rome": {"layers": [5], "values": ROME_VALUES},
    "llama-2-7b/memit": {"layers": layers(4, 8), "lambda_": 15000.0, "values": GPTJ_VALUES},
    "llama-2-7b/emmet": {"layers": [5], "lambda_": 1.0, "mu": 0.1, "values": GPTJ_VALUES},
    "llama-2-7b/pmet": {"layers": layers(4, 8), "lambda_": 6000.0, "values": PMET_VALUES},
    "llama-2-7b/alphaedit": {"layers": layers(4, 8), "threshold": 0.02, "ridge": 10.0, "values": GPTJ_VALUES},
    "llama-2-7b/encore": {"layers": layers(4, 8), "lambda_": 15000.0, "norm_weight": 10.0,
                          "values": GPTJ_VALUES | most_probable(2)},
    "llama-3-8b/rome": {"layers": [5], "values": ROME_VALUES},
    "llama-3-8b/memit": {"layers": layers(4, 8), "lambda_": 15000.0, "values": GPTJ_VALUES},
    "llama-3-8b/emmet": {"layers": [5], "lambda_": 1.0, "mu": 0.1, "values": GPTJ_VALUES},
    "llama-3-8b/pmet": {"layers": layers(4, 8), "lambda_": 6000.0, "values": PMET_VALUES},
    "llama-3-8b/alphaedit": {"layers": layers(4, 8), "threshold": 0.02, "ridge": 10.0,
                             "values": values(0.1, 25, 0.75)},
    "llama-3-8b/encore": {"layers": layers(4, 8), "lambda_": 15000.0, "norm_weight": 20.0,
                          "values": GPTJ_VALUES | most_probable(1)},
    "qwen2.5-7b/memit": {"layers": layers(4, 8), "lambda_": 15000.0, "values": GPTJ_VALUES},
    "gpt2-xl/kn": {"published": True},
    "smollm2/kn": {"search": {"adjust": True}},
    "smollm2/rome": {"layers": [5], "values": ROME_VALUES},
    "smollm2/memit": {"layers": layers(4, 8), "lambda_": 1000.0, "values": GPTJ_VALUES},
    "smollm2/emmet": {"layers": layers(4, 8), "mu": 0.0, "values": GPTJ_VALUES},
    "smollm2/pmet": {"layers": layers(4, 8), "lambda_": 3000.0, "values": PMET_OURS},
    "smollm2/alphaedit": {"layers": layers(4, 8), "threshold": 0.02, "ridge": 10.0, "values": GPTJ_VALUES},
    "smollm2/encore": {"layers": layers(4, 8), "lambda_": 300.0, "norm_weight": 1.0,
                       "values": GPTJ_VALUES | most_probable(1)},
    "gpt2-xl/ft": {"layers": [1], "lr": 5e-4, "epochs": 25, "batch_size": 128},
    "gpt2-xl/ft-l": {"layers": [0], "lr": 5e-4, "epochs": 25, "norm": 5e-4, "batch_size": 128},
    "gpt-j-6b/ft": {"layers": [21], "lr": 5e-4, "epochs": 25, "batch_size": 64},
    "gpt-j-6b/ft-l": {"layers": [0], "lr": 5e-4, "epochs": 25, "norm": 5e-5, "batch_size": 128},
    "gpt-j-6b/ft-w": {"layers": [21], "lr": 5e-4, "epochs": 25, "weight_decay": "power_law",
                      "batch_size": 64, "parts": "block"},
    "llama-2-7b/ft": {"layers": [21], "lr": 5e-4, "epochs": 25, "batch_size": 1, "published": True},
    "llama-2-7b/ft-m": {"layers": [21], "lr": 5e-4, "epochs": 25, "batch_size": 1},
    "llama-3-8b/ft": {"layers": [21], "lr": 5e-4, "epochs": 25, "batch_size": 1, "published": True},
    "llama-3-8b/ft-m": {"layers": [21], "lr": 5e-4, "epochs": 25, "batch_size": 1},
    "llama-3-8b/locft-bf": {"layers": [22], "lr": 5e-4, "epochs": 25, "batch_size": 100, "end_of_text": True},
    "gpt2-xl/mend": {"layers": layers(45, 47)},
    "gpt2-xl/ke": {"layers": layers(45, 47), "condition": "{prompt} {target}", "hidden": 512, "width": 768, "lr": 1e-5},
    "gpt-j-6b/mend": {"layers": layers(25, 27)},
    "llama-2-7b/mend": {"layers": layers(29, 31), "parts": ["mlp_gate", "mlp_in", "mlp"]},
    "llama-3-8b/mend": {"layers": layers(29, 31), "parts": ["mlp_gate", "mlp_in", "mlp"]},
    "smollm2/mend": {"layers": layers(27, 29), "rank": 256, "lr": 2e-5, "rate_lr": 1e-5},
    "smollm2/ke": {"layers": layers(27, 29)},
    "smollm2/ft": {"layers": [0], "lr": 5e-4, "epochs": 25},
    "smollm2/ft-l": {"layers": [0], "lr": 5e-4, "epochs": 25, "norm": 2e-3},
    "smollm2/ft-w": {"layers": [21], "lr": 5e-4, "epochs": 25, "weight_decay": "power_law", "parts": "block"},
    "smollm2/ft-m": {"layers": [21], "lr": 5e-4, "epochs": 25, "batch_size": 1},
    "smollm2/locft-bf": {"layers": [21], "lr": 5e-4, "epochs": 25, "batch_size": 100, "end_of_text": True},
    "gpt2-xl/grace": {"layer": 35, "part": "mlp_in", "lr": 1.0, "steps": 200, "radius": 1.0},
    "gpt-j-6b/grace": {"layer": 25, "lr": 1.0, "steps": 200, "radius": 1.0},
    "llama-2-7b/grace": {"layer": 27, "lr": 1.0, "steps": 50, "radius": 1.0},
    "smollm2/grace": {"layer": 21, "lr": 1.0, "steps": 50, "radius": 0.25, "relative": True},
    "smollm2/defer": {"layer": 21, "lr": 0.1, "steps": 100},
    "smollm2/memory": {"layer": 21, "lr": 0.1, "steps": 100, "entries": 100},
}  # fmt: skip

# kinds of fine-tuning -> the method; and files whose dtype is not the model's
NAMED = dict.fromkeys(("ft", "ft-l", "ft-w", "ft-m", "locft-bf"), "FT")
DTYPES = {"gpt-j-6b/ft-l": "float32"}


def method(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": f"lightedit.{name}", "init_args": settings}


def smollm2(*names: str) -> dict[str, Any]:
    """Methods with the settings of configs/smollm2."""
    return {name: method(name, SETTINGS[f"smollm2/{name.lower()}"]) for name in names}


KEPT = {"run": {"on_collision": "keep"}}

# file -> all of it but the model, its dtype and the facts' file
SWEEPS: dict[str, dict[str, Any]] = {
    "sweeps/methods": {
        "limit": 200, "evaluation": {"generate": True}, **KEPT, "out": "sweeps/methods",
        "methods": smollm2("MEMIT", "EMMET", "PMET", "AlphaEdit", "ENCORE"),
    },
    "sweeps/single": {
        "limit": 200, "facts_per_round": ["single"], "evaluation": {"generate": True}, "out": "sweeps/single",
        "methods": smollm2("ROME", "MEMIT", "PMET"),
    },
    "sweeps/counts": {
        **KEPT, "counts": "log17", "out": "sweeps/counts", "methods": smollm2("MEMIT", "PMET"),
    },
    "sweeps/batch-sizes": {
        **KEPT, "facts_per_round": [1, 10, 100, 1000, 10000], "out": "sweeps/batch-sizes",
        "methods": {
            **smollm2("MEMIT"),
            "EMMET": method("EMMET", {"layers": layers(4, 8), "lambda_": 10000.0, "mu": 0.1, "values": GPTJ_VALUES}),
        },
    },
    "sweeps/smollm2": {
        "limit": 100, "skip": 500, "out": "sweeps/smollm2", "counts": None, "facts_per_round": [None],
        "grid": {"lambda_": [300.0, 1000.0, 3000.0], "norm_weight": [1.0, 20.0], "threshold": [0.005, 0.02, 0.05]},
        "methods": smollm2("MEMIT", "AlphaEdit", "ENCORE"),
    },
    "sweeps/smollm2-pmet": {
        "limit": 100, "skip": 500, "out": "sweeps/smollm2-pmet",
        "grid": {"lambda_": [300.0, 1000.0, 3000.0], "values.clamp_norm_factor": [0.75, 4.0]},
        "methods": {"PMET": method("PMET", {"layers": layers(4, 8), "lambda_": 1000.0, "values": PMET_OURS})},
    },
    "sweeps/smollm2-ft": {
        "limit": 20, "skip": 500, "facts_per_round": ["single"], "out": "sweeps/smollm2-ft",
        "grid": {"layers": [[0], [5], [21], [27]], "norm": [None, 0.002, 0.0005]},
        "methods": {"FT": method("FT", {"layers": [0]})},
    },
    "sweeps/smollm2-rome": {
        "limit": 40, "skip": 500, "facts_per_round": ["single"], "out": "sweeps/smollm2-rome",
        "grid": {"layers": [[4], [5], [6], [8]], "key": ["averaged", "bare"]},
        "methods": smollm2("ROME"),
    },
    "sweeps/smollm2-grace": {
        "limit": 12, "skip": 900, "facts_per_round": ["single"], "out": "sweeps/smollm2-grace",
        "grid": {"layer": [15, 21, 27], "radius": [0.25, 0.5]},
        "methods": {"GRACE": method("GRACE", {"layer": 21, "steps": 50, "relative": True, "radius": 0.5})},
    },
}  # fmt: skip


SHORT = {"prefixes": [["The", 1, 5], ["I", 1, 5]], "bare_weight": None}
FEWER = {"windows": [5], "samples": 5, "essence_texts": 2, "essence_tokens": 50}
SPREAD = [0, 4, 8, 12, 17, 21, 25, 29]


def rome(lr: float, steps: int) -> dict[str, Any]:
    return {"ROME": method("ROME", {"layers": [5], "contexts": SHORT, "values": values(lr, steps, 4.0)})}


# file -> all of it but the model and the facts' file
STUDIES: dict[str, dict[str, Any]] = {
    "studies/smollm2-layers": {
        "limit": 920, "methods": rome(0.5, 20), "settings": {"problems": ["injection"], "layers": SPREAD, **FEWER},
    },
    "studies/smollm2-problems": {
        "limit": 291, "methods": rome(0.5, 20), "forcing": rome(0.5, 25),
        "settings": {"layers": [4, 14, 24], **FEWER},
    },
}  # fmt: skip


def test_every_file_is_in_the_table() -> None:
    assert sorted(FOUND) == sorted(SETTINGS | SWEEPS | STUDIES)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_models_settings_are_the_published_ones(name: str) -> None:
    model, _, method_name = name.partition("/")
    lm, dtype = MODELS[model]
    spelled = NAMED.get(method_name) or next(known for known in METHODS if known.lower() == method_name)
    assert yaml.safe_load(FOUND[name].read_text()) == {
        "lm": lm, "dtype": DTYPES.get(name, dtype), "method": method(spelled, SETTINGS[name]),
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.partition("/")[2] in NAMED])
def test_a_models_fine_tuning_can_be_made(name: str) -> None:
    made = METHODS["FT"](**SETTINGS[name])
    assert asdict(made) == {**asdict(METHODS["FT"](layers=made.layers)), **SETTINGS[name], "layers": made.layers}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_runs_what_its_results_were_made_with(name: str) -> None:
    expected = {"lm": "smollm2", "dtype": "float32", "facts": "counterfact.json", **SWEEPS[name]}
    assert yaml.safe_load(FOUND[name].read_text()) == expected


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_what_its_results_were_made_with(name: str) -> None:
    assert yaml.safe_load(FOUND[name].read_text()) == {"lm": "smollm2", "facts": "counterfact.json", **STUDIES[name]}
    le.LocalizationSettings(**STUDIES[name]["settings"])  # can be made


@pytest.mark.parametrize("name", FOUND)
def test_the_first_line_says_where_the_settings_come_from(name: str) -> None:
    assert FOUND[name].read_text().startswith("# ")


CONTEXTS = {
    "prefixes": (("The", 1, 10), ("Therefore", 1, 10), ("Because", 1, 10), ("I", 1, 10), ("You", 1, 10)),
    "bare_weight": 0.5,
    "seed": 0,
    "separate": False,
}
ROME_CONTEXTS = {"prefixes": (("", 10, 5), ("", 10, 10)), "bare_weight": None, "seed": 0, "separate": False}
PLAIN = {"loss_threshold": 0.05, "stopping": None, "relative_lr": False, "objective": "reach"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "ROME": {"values": ROME_VALUES | PLAIN, "contexts": ROME_CONTEXTS, "key": "averaged"},
    "MEMIT": {"values": GPTJ_VALUES | PLAIN, "contexts": CONTEXTS, "lambda_": 15000.0, "share": None},
    "EMMET": {"values": GPTJ_VALUES | PLAIN, "contexts": CONTEXTS, "lambda_": 1.0, "mu": 0.0},
    "PMET": {"values": PLAIN | PMET_VALUES, "contexts": CONTEXTS, "lambda_": 6000.0,
             "attention_delta": True, "write_attention": False, "even_spread": False},
    "AlphaEdit": {"values": GPTJ_VALUES | PLAIN, "contexts": CONTEXTS,
                  "threshold": 0.02, "relative": False, "ridge": 10.0, "published_history": False},
    "ENCORE": {"values": GPTJ_VALUES | PLAIN | {"stopping": {"extra_steps": 1, "published": False}},
               "contexts": CONTEXTS, "lambda_": 15000.0, "norm_weight": 20.0},
    "KN": {"mode": "update", "subtract": 1.0, "add": 8.0, "scaled": True, "embeddings": "output", "erase_with": "zero",
           "published": False, "search": {"points": 20, "threshold": 0.2, "share": 0.7, "adjust": False, "common": None,
                                          "prompts": "contexts", "contexts": CONTEXTS}},
}  # fmt: skip
TRAINING = {"lr": 5e-4, "epochs": 25, "norm": None, "weight_decay": 0.0, "order": "breadth", "batch_size": 64,
            "stop": 1e-2, "end_of_text": False, "parts": ("mlp",), "objective": "reach", "seed": 0,
            "published": False}  # fmt: skip
TABLES = {"lr": 1e-2, "epochs": 100}  # fine-tuning of GRACE's tables
FINE_TUNING: dict[str, dict[str, Any]] = {
    "FT": TRAINING,
    "EWC": TRAINING | TABLES | {"lambda_": 0.1, "last": 10},
    "Retrain": TRAINING | TABLES | {"every": 50, "passes": 5, "last": None},
}
BOTH_NETWORKS = {"parts": ("mlp_in", "mlp"), "folder": None, "seed": 0, "published": False}
HYPER_NETWORKS: dict[str, dict[str, Any]] = {
    "MEND": {"rank": 1920, "norm": True, "rate": 1e-4, "edit_weight": 0.1, "lr": 1e-6, "rate_lr": 1e-4, "clip": 100.0},
    "KE": {"condition": "{prediction} >> {target} || {prompt}", "hidden": 128, "width": 1024, "middle": 128,
           "constraint": "kl", "margin": None, "margin_end": None, "lr": 3e-4, "multiplier_lr": 0.1, "warmup": 1000,
           "clip": None},
}  # fmt: skip


@pytest.mark.parametrize("name", HYPER_NETWORKS)
def test_what_is_left_out_of_a_hyper_network_is_as_published(name: str) -> None:
    assert asdict(METHODS[name](layers=(1,))) == {"layers": (1,), **BOTH_NETWORKS, **HYPER_NETWORKS[name]}


ADAPTING = {"part": "mlp", "positions": None, "lr": 0.1, "steps": 100, "seed": 0}
ADAPTORS: dict[str, dict[str, Any]] = {
    "GRACE": ADAPTING | {"lr": 1.0, "radius": 1.0, "relative": False, "expand": "coverage", "init": "cold",
                         "stop": 0.0, "published": False},
    "Defer": ADAPTING,
    "Memory": ADAPTING | {"entries": 100, "published": False},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_file_leaves_out_is_as_published(name: str) -> None:
    passes = {"passes": 1} if issubclass(METHODS[name], ClosedForm) else {}
    assert asdict(METHODS[name](layers=(1,))) == {"layers": (1,), **passes, **DEFAULTS[name]}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_what_is_left_out_of_fine_tuning_is_as_published(name: str) -> None:
    assert asdict(METHODS[name](layers=(1,))) == {"layers": (1,), **FINE_TUNING[name]}


@pytest.mark.parametrize("name", ADAPTORS)
def test_what_is_left_out_of_an_adaptor_is_as_published(name: str) -> None:
    assert asdict(METHODS[name](layer=1)) == {"layer": 1, **ADAPTORS[name]}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.partition("/")[2] in ("grace", "defer", "memory")])
def test_a_models_adaptor_can_be_made(name: str) -> None:
    METHODS[next(known for known in ADAPTORS if known.lower() == name.partition("/")[2])](**SETTINGS[name])


def test_every_method_has_its_defaults_in_the_table() -> None:
    assert METHODS.keys() == (DEFAULTS | FINE_TUNING | ADAPTORS | HYPER_NETWORKS).keys()
