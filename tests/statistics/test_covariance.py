import logging
import os
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor

from lightedit.data.texts import TextDataModule, read_texts, token_windows, write_texts
from lightedit.evaluation.held_out_text import held_out_windows
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import LowRankUpdate
from lightedit.statistics import covariance as covariance_module
from lightedit.statistics import estimation
from lightedit.statistics.covariance import Covariance, CovarianceError, Provenance
from lightedit.statistics.estimation import CovarianceModule, SecondMoment, estimate_covariance
from tests.models import BOS, tiny_model, tiny_tokenizer

LAYERS = [1, 2]
SENTENCES = [
    "The river rises in the hills to the north of the city.",
    "Paris is the capital of France, and Zoë moved to 東京 in 1962.",
    "She was born in London and worked in Berlin as a doctor.",
]
D_IN = 80


def make(
    model_type: str = "llama", kind: str = "bytelevel", seed: int = 0, dtype: Any = torch.float32
) -> LanguageModel:
    return LanguageModel(
        tiny_model(model_type, seed=seed, dtype=dtype), tiny_tokenizer(kind), name=f"tiny-{model_type}"
    )


def estimate(lm: LanguageModel, **options: Any) -> Covariance:
    return estimate_covariance(lm, **{"places": LAYERS, "sequence_length": 32, "progress_bar": False} | options)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    paragraphs = [f"{SENTENCES[i % 3]} Line {i}, {i * 37 % 101}.\nIt goes on." for i in range(40)]
    path.write_text("\n\n".join(paragraphs))
    return path


def naive(lm: LanguageModel, windows: list[list[int]], layer: int) -> Tensor:
    """Mean of k kᵀ in float64, one window and one token at a time."""
    d_in = lm.weight(Place(layer)).shape[1]
    total, count = torch.zeros(d_in, d_in, dtype=torch.float64), 0
    seen: list[Tensor] = []
    handle = lm.module(Place(layer)).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, d_in)))
    with torch.no_grad():
        for window in windows:
            lm.model(torch.tensor([window]))
    handle.remove()
    for keys in seen:
        for key in keys.double():
            total += key[:, None] * key[None, :]
            count += 1
    return total / count


# The sum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_second_moment_sums_unmasked_keys_in_float32(dtype: torch.dtype) -> None:
    keys = torch.randn(63, 7).to(dtype)
    mask = torch.rand(63) < 0.6
    keys[~mask] = torch.nan  # what is masked out must not enter, not even as zero times NaN
    moment = SecondMoment(7)
    moment.update(keys[:20], mask[:20])
    moment.update(keys[20:], mask[20:])
    kept = keys[mask].double()
    assert moment.gram.dtype == torch.float32
    assert moment.count == len(kept)
    torch.testing.assert_close(moment.mean().double(), kept.T @ kept / len(kept), rtol=1e-5, atol=1e-6)


def test_mean_of_no_keys_is_an_error() -> None:
    with pytest.raises(CovarianceError, match="no keys"):
        SecondMoment(3).mean()


# The pass over text


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "falcon", "gemma2"])
def test_estimate_equals_a_float64_loop_over_single_tokens(model_type: str, text: Path) -> None:
    lm = make(model_type)
    windows = token_windows(lm, read_texts(text), 850, 32)
    covariance = estimate(lm, text=text, tokens=850)
    assert covariance.provenance.tokens == sum(map(len, windows)) == 850
    for layer in LAYERS:
        expected = naive(lm, windows, layer)
        torch.testing.assert_close(
            covariance[Place(layer)].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max())
        )


def test_padding_and_batch_size_do_not_count(lm: LanguageModel) -> None:
    windows = [row[: 3 + 5 * (i % 6)] for i, row in enumerate(lm.encode([s * 2 for s in SENTENCES * 6]))]
    results = []
    for max_tokens in (1, 200, 10_000):
        module = CovarianceModule(lm, map(Place, LAYERS))
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.predict(module, TextDataModule(windows, lm.pad_id, max_tokens), return_predictions=False)
        assert all(moment.count == sum(map(len, windows)) for moment in module.moments.values())
        results.append(module.moments[Place(2)].mean())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)


def test_one_pass_serves_all_layers_and_ends_at_the_deepest(lm: LanguageModel, text: Path) -> None:
    calls = dict.fromkeys(range(lm.n_layers), 0)

    def count(layer: int) -> Any:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    handles = [lm.blocks[layer].register_forward_pre_hook(count(layer)) for layer in calls]
    try:
        estimate(lm, text=text, tokens=850, max_tokens=128)
    finally:
        for handle in handles:
            handle.remove()
    batches = -(-850 // 128)
    assert calls == {0: batches, 1: batches, 2: batches, 3: 0}


def test_half_precision_model_gives_float32_on_the_cpu(text: Path) -> None:
    covariance = estimate(make(dtype=torch.bfloat16), text=text, tokens=850)
    assert {moment.dtype for moment in covariance.moments.values()} == {torch.float32}
    assert covariance.provenance.dtype == "bfloat16"


def test_estimate_says_nothing_and_leaves_logging_as_it_was(
    lm: LanguageModel, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger, records = logging.getLogger("lightning.pytorch"), []
    handler, level = logging.Handler(), logger.level
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            estimate(lm, text=text, tokens=850)
    finally:
        logger.removeHandler(handler)
    assert records == []
    assert capfd.readouterr() == ("", "")
    assert logger.level == level


def test_what_the_model_keeps_from_the_pass_can_take_part_in_a_backward_pass(lm: LanguageModel, text: Path) -> None:
    kept: list[Tensor] = []  # as models keep rotary tables that they make when they first need them
    handle = lm.blocks[0].register_forward_pre_hook(lambda _, args: kept.append(args[0] * 2))
    try:
        estimate(lm, text=text, tokens=850)
    finally:
        handle.remove()
    delta = torch.ones_like(kept[0], requires_grad=True)
    (delta * kept[0]).sum().backward()
    assert delta.grad is not None


@pytest.mark.slow
def test_two_processes_sum_to_what_one_collects(lm: LanguageModel, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from lightning import Trainer
            from lightedit.statistics.estimation import CovarianceModule
            from lightedit.data.texts import TextDataModule
            from lightedit.lm import LanguageModel, Place
            from tests.models import tiny_model, tiny_tokenizer

            if __name__ == "__main__":
                lm = LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))
                module = CovarianceModule(lm, [Place(1), Place(2)])
                trainer = Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False,
                                  enable_checkpointing=False, enable_progress_bar=False)
                data = TextDataModule(lm.encode(sys.argv[2:]), lm.pad_id, 100)
                trainer.predict(module, data, return_predictions=False)
                moments = {place.key: (moment.count, moment.mean()) for place, moment in module.moments.items()}
                torch.save(moments, f"{sys.argv[1]}.{trainer.global_rank}")
            """
        )
    )
    command = [sys.executable, str(script), str(tmp_path / "moments"), *SENTENCES * 3]
    root = str(Path(__file__).parents[2])
    subprocess.run(command, check=True, cwd=root, env=_environment(root), timeout=300, capture_output=True)
    windows = lm.encode(SENTENCES * 3)
    for rank in range(2):
        moments = torch.load(tmp_path / f"moments.{rank}")
        for layer in LAYERS:
            count, mean = moments[str(layer)]
            assert count == sum(map(len, windows))
            torch.testing.assert_close(mean.double(), naive(lm, windows, layer), rtol=1e-4, atol=1e-4)


def _environment(root: str) -> dict[str, str]:
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# Text


def test_windows_are_full_and_hold_the_text_in_order(text: Path) -> None:
    lm = make()
    windows = token_windows(lm, read_texts(text), 500, 32)
    assert [len(window) for window in windows] == [32] * 15 + [20]
    joined = "\n\n".join(paragraph.strip() for paragraph in text.read_text().split("\n\n"))
    assert joined.startswith(lm.decode([token for window in windows for token in window]))


@pytest.mark.parametrize("tokens", [64, 65, 70])
def test_every_window_starts_with_the_token_that_the_tokenizer_puts_before_a_text(text: Path, tokens: int) -> None:
    windows = token_windows(make(kind="sentencepiece"), read_texts(text), tokens, 32)
    assert all(window[0] == BOS and BOS not in window[1:] and len(window) > 1 for window in windows)
    assert tokens <= sum(map(len, windows)) <= tokens + 1  # a token besides the first may be needed to fill the last


def test_texts_are_paragraphs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\n \nfirst\nstill first\n \n\n\nsecond")
    assert list(read_texts(path)) == list(read_texts(str(path))) == ["first\nstill first\n", "second"]


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/missing/file", Path("missing")])
def test_missing_text_file_is_named(source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        read_texts(source)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\xe9 au lait".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        list(read_texts(path))


class _Rows:
    column_names = ("text", "id")

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter([{"text": "one"}, {"text": ""}, {"text": "two"}])


def test_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> _Rows:
        asked.append((args, options))
        return _Rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_texts("wikitext:wikitext-103-raw-v1")) == ["one", "", "two"]
    assert asked == [(("wikitext", "wikitext-103-raw-v1"), {"split": "train", "streaming": True})]
    monkeypatch.setattr(_Rows, "column_names", ("body",))
    with pytest.raises(ValueError, match="no column 'text', only body"):
        read_texts("some/set")


def test_data_set_that_cannot_be_opened_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(RuntimeError, match=r"'some/set'.*no route.*local \.txt file"):
        read_texts("some/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"lightedit\[data\]"):
        read_texts("some/set")


# The model's self-generated text


@pytest.mark.parametrize("model_type", ["llama", "bloom", "gemma3", "falcon", "opt"])
def test_own_writing_is_drawn_from_the_models_most_probable_tokens(model_type: str) -> None:
    lm = make(model_type)
    windows = write_texts(lm, 200, 24, top_k=3, progress_bar=False)
    assert [len(window) for window in windows] == [24] * 9
    assert {window[0] for window in windows} == {BOS}
    batch = pad(windows, lm.pad_id)
    with torch.no_grad():
        best = lm.forward(batch)[:, :-1].topk(3).indices
    chosen = best == batch.ids[:, 1:, None]
    assert chosen.any(-1).all()
    assert all(chosen[..., rank].any() for rank in range(3))


def test_own_writing_follows_its_seed_and_leaves_the_global_one(lm: LanguageModel) -> None:
    state = torch.get_rng_state()
    first, again, other = (write_texts(lm, 100, 10, seed=seed, progress_bar=False) for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(window) for window in first}) == 10
    assert torch.equal(torch.get_rng_state(), state)


def test_estimate_without_text_uses_the_models_own_writing(lm: LanguageModel) -> None:
    first, again, other = (estimate(lm, tokens=850, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[Place(2)], again[Place(2)])
    assert not torch.equal(first[Place(2)], other[Place(2)])
    assert (first.provenance.corpus, first.provenance.seed) == ("self-generated text", 1)
    torch.testing.assert_close(
        first[Place(1)].double(), naive(lm, write_texts(lm, 850, 32, 1, progress_bar=False), 1), rtol=1e-4, atol=1e-4
    )


def test_default_is_ten_tokens_per_dimension(lm: LanguageModel) -> None:
    covariance = estimate(lm, places=[1])
    assert covariance.provenance.tokens == 10 * D_IN
    covariance.check(lm, [Place(1)])


# What is refused before work starts


def test_edited_model_is_refused(text: Path) -> None:
    lm = make()
    lm.weights.add(("first edit", 0), Place(1), LowRankUpdate(torch.ones(32, 1), torch.ones(D_IN, 1)))
    with pytest.raises(CovarianceError, match=r"first edit.*revert"):
        estimate(lm, text=text)


def test_too_short_text_is_refused_and_a_shorter_one_warned_of(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    for content in ("", "Paris is the capital of France."):
        path.write_text(content)
        with pytest.raises(CovarianceError, match=r"short\.txt holds \d+ tokens; at least d_in = 80 .* 800"):
            estimate(lm, text=path)
    path.write_text(" ".join(SENTENCES * 3))
    with pytest.warns(UserWarning, match=r"short\.txt holds \d+ of 800 tokens"):
        held = estimate(lm, text=path).provenance.tokens
    assert held == sum(map(len, token_windows(lm, read_texts(path), 10_000, 32))) < 800


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 79}, "79 tokens"),
        ({"sequence_length": 257}, "256 positions .* got 257"),
        ({"sequence_length": 1}, "got 1"),
        ({"places": [4]}, "layers 0 to 3"),
        ({"places": []}, "places: none"),
    ],
)
def test_impossible_requests_are_refused(lm: LanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(lm, **options)


# Keeping


def made_for(lm: LanguageModel, moments: dict[int, Tensor], tokens: int = 1000) -> Covariance:
    by_place = {Place(layer): moment for layer, moment in moments.items()}
    return Covariance(by_place, Provenance(lm.name, lm.fingerprint, "text", tokens, 32, "float32"))


def positive(d: int = D_IN) -> Tensor:
    keys = torch.randn(10 * d, d)
    return keys.T @ keys / len(keys)


def test_check_accepts_the_model_it_was_estimated_on(lm: LanguageModel, text: Path) -> None:
    estimate(lm, text=text).check(lm, map(Place, LAYERS))


def test_check_refuses_another_model(lm: LanguageModel) -> None:
    covariance = made_for(lm, {1: positive()})
    with pytest.raises(CovarianceError, match=f"fingerprint {lm.fingerprint}"):
        covariance.check(make(seed=1), [Place(1)])


def test_missing_layer_names_those_there_are(lm: LanguageModel) -> None:
    with pytest.raises(CovarianceError, match=r"no layer 2, only \[1, 3\]"):
        made_for(lm, {1: positive(), 3: positive()}).check(lm, [Place(1), Place(2)])


def test_check_refuses_another_size_even_of_an_unknown_model(lm: LanguageModel) -> None:
    unknown = Provenance("published", None, "text", 1000, None, "float32")
    Covariance({Place(1): positive()}, unknown).check(lm, [Place(1)])
    with pytest.raises(CovarianceError, match=r"\(64, 64\).*\(80, 80\)"):
        Covariance({Place(1): positive(64)}, unknown).check(lm, [Place(1)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_refuses_values_that_are_not_finite(lm: LanguageModel, value: float) -> None:
    moment = positive()
    moment[3, 5] = moment[5, 3] = value
    with pytest.raises(CovarianceError, match="layer 1 holds NaN or infinity"):
        made_for(lm, {1: moment}).check(lm, [Place(1)])


def test_check_refuses_what_is_not_positive_definite(lm: LanguageModel) -> None:
    indefinite = positive() - 2 * torch.eye(D_IN)
    with pytest.raises(CovarianceError, match=r"layer 1 is not positive definite: it averages 900 .* d_in = 800"):
        made_for(lm, {1: indefinite}, tokens=900).check(lm, [Place(1)])
    with pytest.raises(CovarianceError, match="averages 79 tokens"):  # singular, whatever rounding makes of it
        made_for(lm, {1: positive()}, tokens=79).check(lm, [Place(1)])


def test_what_is_saved_is_loaded(lm: LanguageModel, tmp_path: Path) -> None:
    covariance = made_for(lm, {11: positive(), 2: positive()})
    file = covariance.save(tmp_path / "some" / "folder")
    assert [path.name for path in file.parent.iterdir()] == ["covariance.safetensors"]
    for path in (file, file.parent, str(file.parent)):
        loaded = Covariance.load(path)
        assert loaded.provenance == covariance.provenance
        assert list(loaded.moments) == [Place(2), Place(11)]
        assert all(torch.equal(loaded[Place(layer)], covariance[Place(layer)]) for layer in (2, 11))


def test_failing_save_leaves_the_old_file(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = made_for(lm, {1: positive()})
    old.save(tmp_path)

    def fail(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(covariance_module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        made_for(lm, {1: positive()}).save(tmp_path)
    assert torch.equal(Covariance.load(tmp_path)[Place(1)], old[Place(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["covariance.safetensors"]


def test_damaged_file_is_named(lm: LanguageModel, tmp_path: Path) -> None:
    file = made_for(lm, {1: positive()}).save(tmp_path)
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"{}" * 100):
        file.write_bytes(content)
        with pytest.raises(CovarianceError, match=r"covariance\.safetensors is damaged or not a covariance"):
            Covariance.load(tmp_path)
    covariance_module.save_file({"weight": positive()}, file)
    with pytest.raises(CovarianceError, match="not a covariance"):
        Covariance.load(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Covariance.load(tmp_path / "nowhere")


# The published format


def write_npz(path: Path, keys: Tensor, **more: Any) -> Path:
    arrays = {"mom2.mom2": (keys.T @ keys).numpy(), "mom2.count": np.array(len(keys)), "sample_size": np.array(7)}
    np.savez(path, **(arrays | more))
    return path


def test_published_sum_is_read_as_a_mean(tmp_path: Path) -> None:
    keys = {3: torch.randn(50, 6), 17: torch.randn(40, 6)}
    files = {
        layer: write_npz(tmp_path / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz", rows)
        for layer, rows in keys.items()
    }
    for source in (files, tmp_path):
        covariance = Covariance.from_npz(source, model="gpt2-xl")
        assert covariance.provenance.tokens == 40
        assert covariance.provenance.fingerprint is None
        for layer, rows in keys.items():
            torch.testing.assert_close(covariance[Place(layer)], rows.T @ rows / len(rows))


def test_published_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="_mom2_"):
        Covariance.from_npz(tmp_path)
    file = write_npz(tmp_path / "model.layers.4.mlp.down_proj_float32_mom2_100000.npz", torch.randn(50, 6))
    assert list(Covariance.from_npz(tmp_path).moments) == [Place(4)]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CovarianceError, match=r"down_proj.* is damaged"):
        Covariance.from_npz(tmp_path)
    np.savez(file, mean=np.eye(3))
    with pytest.raises(CovarianceError, match=r"mom2\.mom2"):
        Covariance.from_npz({4: file})
    write_npz(file, torch.randn(50, 6), **{"mom2.count": np.array(0)})
    with pytest.raises(CovarianceError, match="over 0 tokens"):
        Covariance.from_npz({4: file})
    write_npz(tmp_path / "transformer.h.4.mlp.c_proj_float32_mom2_100000.npz", torch.randn(50, 6))
    with pytest.raises(CovarianceError, match="both of layer 4"):
        Covariance.from_npz(tmp_path)


# The cache


def test_cache_spares_a_second_pass_and_grows_by_layers(
    lm: LanguageModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEDIT_CACHE", str(tmp_path / "cache"))
    first = estimate(lm, text=text, places=[1], cache=True)
    wider = estimate(lm, text=text, places=[2], cache=True)
    assert sorted(wider.moments) == [Place(1), Place(2)]
    torch.testing.assert_close(wider[Place(1)], first[Place(1)])
    monkeypatch.setattr(estimation, "token_windows", None)  # whatever reads text now fails
    again = estimate(lm, text=text, cache=True)
    assert torch.equal(again[Place(2)], wider[Place(2)])
    for change in ({"sequence_length": 16}, {"tokens": 900}):
        with pytest.raises(TypeError):
            estimate(lm, text=text, cache=True, **change)
    text.write_text(text.read_text() + "more")
    with pytest.raises(TypeError):
        estimate(lm, text=text, cache=True)


def test_cache_tells_models_and_seeds_apart(lm: LanguageModel, tmp_path: Path) -> None:
    kept = [estimate(m, tokens=850, seed=seed, cache=tmp_path) for m, seed in ((lm, 0), (lm, 1), (make(seed=1), 0))]
    assert len(list(tmp_path.rglob("covariance.safetensors"))) == 3
    assert torch.equal(estimate(lm, tokens=850, seed=1, cache=tmp_path)[Place(1)], kept[1][Place(1)])


def test_damaged_cache_is_named(lm: LanguageModel, tmp_path: Path) -> None:
    estimate(lm, tokens=850, cache=tmp_path)
    next(tmp_path.rglob("covariance.safetensors")).write_bytes(b"half")
    with pytest.raises(CovarianceError, match="delete it"):
        estimate(lm, tokens=850, cache=tmp_path)


def test_a_methods_places_are_those_estimated(lm: LanguageModel, text: Path) -> None:
    method = types.SimpleNamespace(covariance_places=(Place(2), Place(1, "attention_out")))
    found = estimate(lm, places=method, text=text, tokens=850)
    alone = estimate(lm, places=[Place(1, "attention_out"), 2], text=text, tokens=850)
    assert list(found.moments) == list(alone.moments) == [Place(1, "attention_out"), Place(2)]
    assert all(torch.equal(found[place], alone[place]) for place in found.moments)


def test_held_out_text_is_not_what_the_covariance_was_estimated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = make(), []

    def watched(*args: Any, **kwargs: Any) -> list[list[int]]:
        seen.append(write_texts(*args, **kwargs))
        return seen[0]

    monkeypatch.setattr(estimation, "write_texts", watched)
    held_out = held_out_windows(lm, None)
    # as much text as is held out: with one seed, as many windows of equal length are equal
    estimate_covariance(lm, [1], tokens=sum(map(len, held_out)), progress_bar=False)
    assert list(map(len, seen[0])) == list(map(len, held_out))
    assert not {tuple(window) for window in seen[0]} & {tuple(window) for window in held_out}
