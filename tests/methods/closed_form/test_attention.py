"""PMET with the attention's output matrix written too: its closed form, its covariance, and what becomes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from safetensors import safe_open
from torch import Tensor

import lightedit as le
from lightedit.__main__ import main
from lightedit.data.prompts import Contexts, ContextSettings, tokenize_facts
from lightedit.data.texts import read_texts, token_windows
from lightedit.lm import LanguageModel, Place
from lightedit.methods import PMET
from lightedit.methods.closed_form.behind_norm import before_norm
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.values import optimize_values
from lightedit.methods.closed_form.writing import write_facts
from lightedit.statistics.covariance import Covariance, CovarianceError, Provenance
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from tests.runs import run as run_quietly

LAYERS = (1, 2)
BOTH = [Place(layer, part) for layer in LAYERS for part in ("attention_out", "mlp")]
CONTEXTS = Contexts(("{}", "The river rises in the hills. {}", "I think so. {}"), (0.5, 0.25, 0.25))
FACTS = [
    le.Fact("The capital of {}", "France", "Rome", target_true="Paris"),
    le.Fact("{} is owned by", "The old tower", "Berlin", target_true="Bonn"),
    le.Fact("It is said that the mother tongue of {} is", "Zoë Müller", "Spanish", target_true="French"),
]
METHOD = PMET(
    layers=LAYERS,
    values=le.ValueSettings(lr=0.3, steps=4, clamp_norm_factor=2.0),
    contexts=ContextSettings(prefixes=(("The", 1, 5),)),
    lambda_=0.5,
    write_attention=True,
)


def language_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"), name="tiny")


def covariance_of(lm: LanguageModel, matrices: list[Place] = BOTH) -> Covariance:
    moments = {}
    for index, matrix in enumerate(matrices):
        keys = torch.randn(500, lm.weight(matrix).shape[1], generator=torch.Generator().manual_seed(index))
        moments[matrix] = keys.T @ keys / 500
    return Covariance(moments, Provenance(lm.name, lm.fingerprint, "noise", 500, 8, "float32"))


def parameters(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


def run(lm: LanguageModel, method: le.Method = METHOD, **options: Any) -> le.Edit:
    return run_quietly(lm, FACTS, method, covariance=covariance_of(lm), facts_per_round=2, **options)


# The closed form


@contextmanager
def watched(module: torch.nn.Module, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    def keep(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0].flatten(0, -2), output.flatten(0, -2)))

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def plain(lm: LanguageModel, module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Averaged inputs [d_in, B] and outputs on the bare prompts [d, B] at the subjects, one whole text at a time."""
    keys, outputs = [], []
    for prompt in tokenize_facts(lm.tokenizer, FACTS, CONTEXTS):
        seen: list[tuple[Tensor, Tensor]] = []
        with watched(module, seen):
            for row in prompt.rows:
                lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        at = [(one[row.lookup], other[row.lookup]) for (one, other), row in zip(seen, prompt.rows, strict=True)]
        keys.append(sum(weight * key for (key, _), weight in zip(at, prompt.key_weights, strict=True)))
        outputs.append(at[0][1])
    return torch.stack(keys, dim=1), torch.stack(outputs, dim=1)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "gemma3"])  # gptj: attention and MLP in parallel
def test_both_matrices_equal_the_dense_solve_in_turn(architecture: str) -> None:
    lm, other = (language_model(architecture, torch.float64) for _ in range(2))
    covariance = covariance_of(lm)
    targets = {part: torch.randn(lm.d_model, len(FACTS), dtype=torch.float64) for part in ("attention_out", "mlp")}
    preservation = {matrix: METHOD.preservation(covariance, matrix) for matrix in BOTH}
    prompts = tokenize_facts(lm.tokenizer, FACTS, CONTEXTS)
    stacked = torch.cat([targets["attention_out"], targets["mlp"]])
    written = {
        matrix: (update, keys)
        for matrix, update, keys in write_facts(lm, METHOD, preservation, prompts, stacked, "round")
    }
    assert list(written) == BOTH

    shares = {1: 0.5**0.5, 2: 1.0}
    tolerance = 1e-7 if architecture == "gptj" else 1e-9  # whose rotary angles are float32
    for matrix in BOTH:
        module, last = other.module(matrix), other.module(replace(matrix, layer=LAYERS[-1]))
        keys, _ = plain(other, module)
        residuals = shares[matrix.layer] * (targets[matrix.name] - plain(other, last)[1])
        if matrix == Place(LAYERS[0]) and (norm := other.mlp_norm(LAYERS[1])) is not None:
            ends = plain(other, last)[1]  # a residual at one layer is carried back through the norms of both
            shift = norm((ends + targets["mlp"] - ends).T).T - norm(ends.T).T
            walk = KeyWalk(other, prompts, matrix)
            residuals = before_norm(walk, shares[matrix.layer] * shift)
        system = METHOD.lambda_ * covariance[matrix].double() + keys @ keys.T
        change = torch.linalg.solve(system, keys @ residuals.T).T
        update, found = written[matrix]
        assert relative(found, keys) < tolerance
        assert relative(update.dense(), change) < 10 * tolerance
        module.weight.data.add_(change.T if architecture == "gpt2" else change)
    for name, parameter in other.model.named_parameters():
        torch.testing.assert_close(lm.model.get_parameter(name), parameter, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_preservation_attention_and_mlp_both_give_their_targets(architecture: str) -> None:
    # in float64 the stock gemma2 gives NaN at padding that its window keeps from all other tokens
    dtype, tolerance = (torch.float32, 1e-3) if architecture == "gemma2" else (torch.float64, 1e-5)
    lm = language_model(architecture, dtype)
    method = replace(METHOD, layers=(2,), lambda_=1e-9)
    covariance = covariance_of(lm)
    prompts = tokenize_facts(lm.tokenizer, FACTS, Contexts())
    targets = torch.randn(2 * lm.d_model, len(FACTS), dtype=torch.float64)
    preservation = {matrix: method.preservation(covariance, matrix) for matrix in method.places}
    list(write_facts(lm, method, preservation, prompts, targets, "round"))
    walk = KeyWalk(lm, prompts, Place(2))
    attention, mlp = targets.chunk(2)
    assert relative(walk.outputs(Place(2, "attention_out")), attention) < tolerance
    # keys read before the attention was written would miss it
    assert relative(walk.outputs(Place(2, "mlp")), mlp) < tolerance


# The edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj"])
def test_an_edit_of_both_is_saved_loaded_applied_and_reverted(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    lm = language_model(architecture, dtype)
    before = parameters(lm)
    edit = run(lm)
    after = parameters(lm)
    changed = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
    assert changed == {f"{lm.module_name(place)}.weight" for place in BOTH}
    assert [list(updates) for updates in edit.rounds] == [BOTH, BOTH] and edit.layers == list(LAYERS)
    assert all(update.norm() > 0 for updates in edit.rounds for update in updates.values())

    loaded = le.Edit.load(edit.save(tmp_path / "edit"))
    with safe_open(tmp_path / "edit" / "edit.safetensors", "pt") as file:
        assert {"round.0.layer.1.left", "round.1.layer.2_attention_out.right"} < set(file.keys())
    assert [list(updates) for updates in loaded.rounds] == [BOTH, BOTH] and loaded.layers == edit.layers
    for model, found in ((lm, edit), (language_model(architecture, dtype), loaded)):
        if model is not lm:
            found.apply(model)
        assert all(torch.equal(model.model.get_parameter(name), parameter) for name, parameter in after.items())
        found.revert(model)
        assert all(torch.equal(model.model.get_parameter(name), parameter) for name, parameter in before.items())


def test_the_mlps_names_in_files_are_their_layers_alone(tmp_path: Path) -> None:
    lm = language_model()
    run(lm, replace(METHOD, write_attention=False), checkpoint=tmp_path / "run").save(tmp_path / "edit")
    names = {}
    for file in (tmp_path / "edit" / "edit.safetensors", tmp_path / "run" / "round-0001.safetensors"):
        with safe_open(file, "pt") as opened:
            names[file.name] = {name for name in opened.keys() if not name.startswith("value.")}  # noqa: SIM118
    sides = ("left", "right")
    assert names["edit.safetensors"] == {
        f"round.{r}.layer.{i}.{side}" for r in (0, 1) for i in LAYERS for side in sides
    }
    assert names["round-0001.safetensors"] == {"random", *(f"change.{i}.{side}" for i in LAYERS for side in sides)}


class Stopped(Exception):
    pass


class StopBeforeTheSecondRound(Callback):
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise Stopped


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    expected, lm = language_model(), language_model()
    whole = run(expected)
    with pytest.raises(Stopped):
        run(lm, checkpoint=tmp_path, callbacks=[StopBeforeTheSecondRound()])
    assert not lm.weights.owners
    with pytest.raises(le.ResumeError, match=r"differs in method\.write_attention"):
        run(lm, replace(METHOD, write_attention=False), checkpoint=tmp_path)
    edit = run(lm, checkpoint=tmp_path)
    assert [list(updates) for updates in edit.rounds] == [list(updates) for updates in whole.rounds]
    for name, parameter in parameters(expected).items():
        assert torch.equal(lm.model.get_parameter(name), parameter), name


def test_health_watches_both(tmp_path: Path) -> None:
    lm = language_model()
    base = {matrix: lm.weight(matrix).clone() for matrix in BOTH}
    health = le.Health([[5, 60, 70, 8, 9]], folder=tmp_path)
    edit = run(lm, callbacks=[health])
    last = health.records[-1]
    drift = torch.stack([(lm.weight(matrix) - weight).norm() for matrix, weight in base.items()]).norm()
    assert last["drift"] == pytest.approx(float(drift), rel=1e-5)
    for name, matrix in (("layer_2", Place(2)), ("layer_2_attention_out", Place(2, "attention_out"))):
        assert last[f"update_norm/{name}"] == pytest.approx(edit.rounds[1][matrix].norm())
        assert last[f"weight_norm/{name}"] == pytest.approx(float(lm.weight(matrix).norm()), rel=1e-6)


def test_known_targets_hold_the_attentions_first() -> None:
    expected, lm = language_model(), language_model()
    prompts = tokenize_facts(lm.tokenizer, FACTS, METHOD.contexts.sample(lm))
    found = optimize_values(lm, prompts, METHOD.value_layer, METHOD.site, METHOD.values)
    for half, module in enumerate((lm.module(Place(2, "attention_out")), lm.module(Place(2)))):
        torch.testing.assert_close(found.initial.chunk(2, dim=1)[half].T, plain(lm, module)[1], rtol=1e-4, atol=1e-4)
    targets = 2 * found.targets  # other ones than a search would find
    edit = run_quietly(lm, FACTS, METHOD, covariance=covariance_of(lm), targets=dict(enumerate(targets)))
    preservation = {matrix: METHOD.preservation(covariance_of(lm), matrix) for matrix in BOTH}
    written = write_facts(expected, METHOD, preservation, prompts, targets.T.double(), "round")
    for matrix, update, _ in written:
        torch.testing.assert_close(edit.rounds[0][matrix].dense(), update.dense())


# What is refused


def test_writing_what_is_not_found_is_refused() -> None:
    with pytest.raises(ValueError, match=r"write_attention=True .* attention_delta=False"):
        PMET(layers=LAYERS, attention_delta=False, write_attention=True)


def test_a_covariance_without_the_attention_is_refused_with_the_way_out() -> None:
    lm = language_model()
    before = parameters(lm)
    for held, named in (
        [BOTH[1::2], "only other matrices"],
        [[*BOTH[1::2], BOTH[0]], r"no layer 2 attention_out, only \[1\]"],
    ):
        with pytest.raises(CovarianceError, match=rf"{named}.*estimate_covariance\(lm, method\)"):
            run_quietly(lm, FACTS, METHOD, covariance=covariance_of(lm, held))
    covariance_of(lm, BOTH[1::2]).check(lm, PMET(layers=LAYERS).places)
    assert all(torch.equal(lm.model.get_parameter(name), parameter) for name, parameter in before.items())


def test_the_attentions_moment_must_fit_and_be_finite() -> None:
    lm = language_model("qwen3")  # its heads are wider than the model
    covariance = covariance_of(lm)
    attention = Place(1, "attention_out")
    assert covariance[attention].shape != (lm.d_model, lm.d_model)
    covariance.moments[attention][0, 0] = torch.nan
    with pytest.raises(CovarianceError, match="layer 1 attention_out holds NaN"):
        covariance.check(lm, BOTH)
    covariance.moments[attention] = torch.eye(3)
    with pytest.raises(CovarianceError, match=r"layer 1 attention_out is \(3, 3\), but tiny needs \(64, 64\)"):
        covariance.check(lm, BOTH)


@pytest.mark.parametrize("attention_delta", [True, False])
def test_targets_of_another_site_are_refused(attention_delta: bool) -> None:
    lm = language_model()
    method = replace(METHOD, attention_delta=attention_delta, write_attention=False)
    wrong = torch.zeros(lm.d_model * (1 if attention_delta else 2))
    with pytest.raises(ValueError, match=rf"value of fact 1 is .* but '{method.site.replace('+', '.')}' takes"):
        run(lm, method, targets={1: wrong})


# The covariance


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Line {i}, {i * 37 % 101}. Paris is the capital of France." for i in range(60)))
    return path


def estimate(lm: LanguageModel, **options: Any) -> Covariance:
    places = BOTH if options.pop("attention", False) else LAYERS
    return le.estimate_covariance(lm, places, **{"sequence_length": 32, "progress_bar": False} | options)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gptj", "opt", "falcon", "gemma2", "bloom"])
def test_the_attentions_inputs_equal_a_plain_loop(architecture: str, text: Path) -> None:
    lm = language_model(architecture)
    alone = estimate(lm, text=text, tokens=850)
    covariance = estimate(lm, text=text, tokens=850, attention=True)
    assert list(covariance.moments) == BOTH and list(alone.moments) == BOTH[1::2]
    for layer in LAYERS:
        torch.testing.assert_close(covariance[Place(layer)], alone[Place(layer)])  # nothing changes for the MLP
        attention, seen = Place(layer, "attention_out"), []
        with torch.no_grad(), watched(lm.module(Place(layer, "attention_out")), seen):
            for window in token_windows(lm, read_texts(text), 850, 32):
                lm.model(torch.tensor([window]))
        total = torch.zeros(lm.weight(attention).shape[1], lm.weight(attention).shape[1], dtype=torch.float64)
        for key in torch.cat([keys for keys, _ in seen]).double():
            total += key[:, None] * key[None, :]
        expected = total / 850
        torch.testing.assert_close(
            covariance[attention].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max())
        )


def test_one_pass_serves_both(text: Path) -> None:
    lm = language_model()
    calls: list[int] = []
    handle = lm.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    estimate(lm, text=text, tokens=850, attention=True, max_tokens=128)
    handle.remove()
    assert len(calls) == -(-850 // 128)


def test_it_is_kept_by_name_and_the_cache_grows(text: Path, tmp_path: Path) -> None:
    lm = language_model()
    estimate(lm, text=text, tokens=850, cache=tmp_path / "cache")
    both = estimate(lm, text=text, tokens=850, cache=tmp_path / "cache", attention=True)
    (file,) = (tmp_path / "cache").rglob("covariance.safetensors")
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {"layer.1", "layer.2", "layer.1_attention_out", "layer.2_attention_out"}
    loaded = Covariance.load(file)
    assert list(loaded.moments) == BOTH
    assert all(torch.equal(loaded[matrix], both[matrix]) for matrix in BOTH)
    text.unlink()  # whatever would read it now fails
    narrow = le.Covariance.load(file)
    assert torch.equal(narrow[Place(1)], both[Place(1)])
    values, _ = loaded.eigen(BOTH[0])
    assert len(values) == lm.weight(BOTH[0]).shape[1] and (file.parent / "eigen.1_attention_out.safetensors").is_file()


# The command line


def test_the_commands_estimate_and_write_the_attention_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTEDIT_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer("bytelevel").save_pretrained("model")
    le.write_facts("facts.jsonl", FACTS)
    Path("text.txt").write_text("The river is long and the city is old. Paris is in France. " * 200)
    statistics = ["covariance", "--lm", "model", "--text", "text.txt", "--tokens", "900"]
    both = ["--method", "PMET", "--method.layers", "[1,2]", "--method.write_attention"]
    main([*statistics, "--layers", "[1,2]", "--out", "mlp"])
    main([*statistics, *both, "--out", "both"])
    edit = ["edit", "--lm", "model", "--facts", "facts.jsonl", "--method", "PMET", "--method.layers", "[1,2]",
            "--method.write_attention", "--method.values.steps", "3", "--evaluate", "false"]  # fmt: skip
    with pytest.raises(SystemExit):
        main([*edit, "--covariance", "mlp", "--out", "edits/x"])
    assert "no layer 1 attention_out" in capsys.readouterr().err
    for name, covariance in (("given", ["--covariance", "both"]), ("estimated", [])):
        with pytest.raises(SystemExit, match="3"):  # three steps reach little
            main([*edit, *covariance, "--out", f"edits/{name}"])
        assert list(le.Edit.load(f"edits/{name}").rounds[0]) == BOTH
    (cached,) = (tmp_path / "cache" / "stats").rglob("covariance.safetensors")
    assert list(Covariance.load(cached).moments) == BOTH
