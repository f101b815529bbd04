"""One live implementation an op and device; an extension that does not fit is told of and never loaded."""

import shutil
from pathlib import Path

import pytest
import torch

from lightedit.ops import NATIVE_STATUS, implementations, second_moment_, use
from lightedit.ops._gpus import capabilities, fits
from lightedit.ops._native import gpu_codes, load
from lightedit.ops._sources import digest

PACKAGE = Path(__file__).parents[2] / "lightedit"
OPS = {"second_moment_", "preservation_memorization_solve", "add_low_rank_", "rowwise_low_rank", "target_nll_kl"}
BUILT = NATIVE_STATUS.startswith("built")
needs_native = pytest.mark.skipif(not BUILT, reason=f"the native extension is {NATIVE_STATUS}")


def live() -> set[str]:
    return {name for of_op in implementations().values() for name in of_op.values()}


def test_every_op_has_one_live_implementation() -> None:
    assert implementations().keys() == OPS
    on_cpu = {of_op["cpu"] for of_op in implementations().values()}
    assert on_cpu == ({"native", "reference"} if BUILT else {"reference"})
    if capabilities() and min(capabilities()) >= (8, 0):
        assert "reference" not in {of_op["cuda"] for of_op in implementations().values()}


@pytest.mark.parametrize(
    ("codes", "runs", "does_not"),
    [
        (["sm_90a"], [(9, 0)], [(8, 0), (10, 0)]),
        (["sm_80"], [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0)]),
        (["compute_80"], [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        (["compute_90a"], [(9, 0)], [(10, 0)]),
        (["sm_80", "compute_80", "sm_90a"], [(8, 0), (9, 0), (10, 3)], [(7, 0)]),
        (["sm_120"], [(12, 0), (12, 1)], [(10, 0)]),
        ([], [], [(8, 0)]),
    ],
)
def test_compiled_kernels_run_on_the_gpus_that_their_code_is_for(
    codes: list[str], runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(fits(codes, capability) for capability in runs)
    assert not any(fits(codes, capability) for capability in does_not)


def test_the_gpus_of_an_extension_are_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "_native.so"
    assert gpu_codes(file) == []
    for content, codes in (
        (b"lightedit built for torch=1 from sources=0 for gpus=sm_80,sm_90a end", ["sm_80", "sm_90a"]),
        (b"lightedit built for torch=1 from sources=0 for gpus= end", []),
        (b"lightedit built for torch=1 from sources=0 end", []),
    ):
        file.write_bytes(content)
        assert gpu_codes(file) == codes


def test_a_choice_holds_within_its_context_only() -> None:
    before = implementations()
    with use("reference"):
        assert live() == {"reference"}
        with pytest.raises(KeyError), use("reference"):
            raise KeyError
        assert live() == {"reference"}
    assert implementations() == before


@needs_native
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="without matrix units both sum alike")
def test_the_chosen_implementation_is_the_one_that_runs() -> None:
    """Tiles of bfloat16 and whole products sum in different orders, so that the last bits tell them apart."""
    keys = torch.randn(3000, 300).bfloat16()

    def gram() -> torch.Tensor:
        result = torch.zeros(300, 300)
        second_moment_(result, keys)
        return result

    native = gram()
    with use("reference"):
        reference = gram()
        with use("native"):
            assert gram().equal(native)
        assert gram().equal(reference)
    assert gram().equal(native)
    assert not native.equal(reference)


def test_what_is_not_there_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="one of reference, triton, native, got 'cuda'"), use("cuda"):  # type: ignore[arg-type]
        pass
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no triton implementation on cpu"), use("triton"):
            pass
    if not BUILT:
        with pytest.raises(RuntimeError, match="no native implementation on cpu: the extension is not built"):
            use("native").__enter__()


def test_no_extension_is_no_reason_for_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert load(tmp_path / "_native.so") == "not built"
    (tmp_path / "_native_missing.txt").write_text("compiling it failed: no g++\n")
    assert load(tmp_path / "_native.so") == "not built (compiling it failed: no g++)"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", "damaged"),
        (b"\x7fELF and more", "damaged"),
        (b"lightedit built for torch=1.0.0 from sources=0 end", r"stale \(built for torch 1.0.0, not"),
        (
            b"lightedit built for torch=%s from sources=0 end" % torch.__version__.split("+")[0].encode(),
            "other sources",
        ),
    ],
)
def test_an_extension_that_does_not_fit_is_told_of_and_not_loaded(tmp_path: Path, content: bytes, status: str) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "_native.so").write_bytes(content)
    with pytest.warns(UserWarning, match=f"{status}.*the slower reference runs instead; rebuild it with"):
        load(tmp_path / "_native.so", tmp_path / "csrc")


def test_an_extension_that_cannot_be_loaded_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    stamp = f"lightedit built for torch={torch.__version__.split('+')[0]} from sources={digest(tmp_path / 'csrc')} end"
    (tmp_path / "_native.so").write_bytes(stamp.encode())
    with pytest.warns(UserWarning, match="broken"):
        assert load(tmp_path / "_native.so", tmp_path / "csrc").startswith("broken")


@needs_native
def test_a_changed_source_makes_the_extension_stale(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(PACKAGE.parent / "csrc", csrc)
    assert digest(csrc) == digest(PACKAGE.parent / "csrc")
    with (csrc / "build.cpp").open("a") as file:
        file.write("\n")
    with pytest.warns(UserWarning, match="built from other sources"):
        load(PACKAGE / "_native.so", csrc)
