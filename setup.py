"""The native extension, which is optional: without it the package runs on its reference implementations.

LIGHTEDIT_BUILD_EXT: "auto" (default) builds it where torch and a compiler are at hand and says why where they are not;
"1" fails instead; "0" leaves it out, and removes one that was built before. pip needs `--no-build-isolation`, so that
it is built for the torch that is there.

With a torch for CUDA it also holds the CUDA kernels if there is a GPU, or if FORCE_CUDA is 1, for the architectures of
TORCH_CUDA_ARCH_LIST. They need the CUDA toolkit (CUDA_HOME); where it is missing, or fails to compile them, Triton's
kernels run instead.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
BUILT = ROOT / "lightedit" / "_native.so"
MISSING = BUILT.with_name("_native_missing.txt")  # why it, or a part of it, is not there: pip hides what a build prints
CHOICE = os.environ.get("LIGHTEDIT_BUILD_EXT", "auto")
# Without debugging symbols, which would make up most of the file
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
ARCHITECTURES = "8.0+PTX 9.0a"


def extension() -> dict[str, Any]:
    """Arguments of `setup` that build the extension; none where it is not wanted or cannot be built."""
    if CHOICE not in ("auto", "0", "1"):
        raise SystemExit(f"LIGHTEDIT_BUILD_EXT is auto, 0 or 1, got {CHOICE!r}")
    if CHOICE == "0":
        BUILT.unlink(missing_ok=True)  # an editable install would go on loading it
        go_without("left out by LIGHTEDIT_BUILD_EXT=0")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        go_without(f"torch could not be imported during the build: {error}; install with --no-build-isolation")
        return {}

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                try:
                    super().build_extensions()
                    MISSING.unlink(missing_ok=True)
                except Exception as error:
                    if not cuda or CHOICE == "1":
                        raise
                    reason = f"without CUDA kernels: compiling them failed: {str(error).strip()}"
                    print(f"lightedit: {reason}; now the C++ kernels alone", file=sys.stderr)
                    vars(self.extensions[0]).update(parts(module(cuda=False)))
                    super().build_extensions()
                    keep(reason)
            except Exception as error:
                self.extensions = []  # nothing to copy or to install
                go_without(f"compiling it failed: {str(error).strip()}")

    cuda = wants_cuda()
    return {"ext_modules": [module(cuda)], "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)}}


def module(cuda: bool) -> Any:
    """The extension with or without its CUDA kernels, as setuptools describes one."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, _get_cuda_arch_flags

    gpus: list[str] = []
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        gpus = [flag.rpartition("code=")[2] for flag in _get_cuda_arch_flags()]  # such as sm_90a
    folders = ["cpu", "cuda"] if cuda else ["cpu"]
    files = [file for folder in folders for file in ROOT.glob(f"csrc/{folder}/*.c*")]
    return (CUDAExtension if cuda else CppExtension)(
        "lightedit._native",
        ["csrc/build.cpp", *sorted(str(file.relative_to(ROOT)) for file in files)],
        define_macros=[
            ("LIGHTEDIT_SOURCES", runpy.run_path(str(ROOT / "lightedit/ops/_sources.py"))["digest"](ROOT / "csrc")),
        ],
        # The GPUs are no macro of all files: nvcc takes a comma for the end of one, and sm_80 is a name in its headers
        extra_compile_args={"cxx": [*FLAGS, f"-DLIGHTEDIT_GPUS={','.join(gpus)}"], "nvcc": ["-O3"]},
        extra_link_args=["-fopenmp"],
        py_limited_api=True,  # it holds no Python: one file serves every version
    )


def parts(module: Any) -> dict[str, Any]:
    """What of a module depends on whether it has CUDA kernels."""
    names = ("sources", "define_macros", "include_dirs", "libraries", "library_dirs", "extra_compile_args")
    return {name: getattr(module, name) for name in names}


def wants_cuda() -> bool:
    """Whether the CUDA kernels are built, too."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    forced = os.environ.get("FORCE_CUDA") == "1"
    if not (forced or torch.cuda.is_available()):
        return False
    for missing, problem in (
        (torch.version.cuda is None, f"torch {torch.__version__} is not one for CUDA"),
        (CUDA_HOME is None, "there is no CUDA toolkit; set CUDA_HOME to its folder"),
    ):
        if missing:
            if forced:
                raise SystemExit(f"FORCE_CUDA=1, but {problem}")
            print(f"lightedit: no CUDA kernels: {problem}", file=sys.stderr)
            return False
    return True


def go_without(reason: str) -> None:
    if CHOICE == "1":
        raise SystemExit(f"LIGHTEDIT_BUILD_EXT=1, but there is no native extension: {reason}")
    print(f"lightedit: no native extension: {reason}", file=sys.stderr)
    keep(reason)


def keep(reason: str) -> None:
    MISSING.write_text(reason.splitlines()[0] + "\n", encoding="utf-8")


setup(**extension())
