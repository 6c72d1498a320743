"""Kernels are compiled where that is wanted and possible, kept where the operator says, and done without elsewhere."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ourvidz_core.engine.compilation import CompiledCall, compiled_so_far, is_compiler_error, keep_kernels, may_compile
from ourvidz_core.settings import Settings


def test_nothing_is_compiled_without_a_gpu():
    assert not may_compile("cpu", {})


def test_an_operator_can_do_without_compiling():
    # The device is not even looked at: this machine may have none.
    assert not may_compile("cuda", {"OURVIDZ_COMPILE": "off"})


def test_kernels_are_kept_beside_the_state_unless_the_operator_says_otherwise(tmp_path: Path):
    environ: dict[str, str] = {"TRITON_CACHE_DIR": "/somewhere/else"}

    keep_kernels(Settings(state_dir=tmp_path / "state"), environ)

    assert environ == {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "state" / "kernels" / "inductor"),
        "TRITON_CACHE_DIR": "/somewhere/else",
    }
    assert not list(tmp_path.iterdir())  # a machine without a GPU gets no directories


def test_a_directory_that_cannot_be_written_to_is_said_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("no directory")
    environ: dict[str, str] = {}

    with caplog.at_level(logging.WARNING):
        keep_kernels(Settings(kernels_dir=tmp_path / "file" / "kernels"), environ)

    assert environ == {}
    assert "set OURVIDZ_KERNELS_DIR" in caplog.text


def test_the_engine_keeps_kernels_before_anything_imports_torch():
    program = (
        "import sys, ourvidz_core.engine.server as server\n"
        "server.os.dup2 = lambda *_: None\n"
        "server.keep_kernels = lambda settings: print('torch' in sys.modules) or sys.exit(0)\n"
        "server.main(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "False", done.stderr


def test_a_function_that_cannot_be_compiled_runs_as_it_is_with_one_warning(caplog: pytest.LogCaptureFixture):
    import torch._dynamo.exc

    def compiled(_: int) -> int:
        raise torch._dynamo.exc.InternalTorchDynamoError("no kernels today")

    call = CompiledCall(lambda number: number + 1, compiled=compiled, name="the adder")
    with caplog.at_level(logging.WARNING):
        assert [call(1), call(2)] == [2, 3]

    assert not call.is_compiled
    assert caplog.text.count("the adder cannot be compiled and runs slower: no kernels today") == 1


def test_a_fault_of_the_model_is_no_reason_to_run_it_again():
    def compiled(_: int) -> int:
        raise RuntimeError("CUDA error: misaligned address")

    call = CompiledCall(lambda number: pytest.fail("it ran again"), compiled=compiled, name="the adder")
    with pytest.raises(RuntimeError, match="misaligned"):
        call(1)
    assert call.is_compiled


def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_compiler():
    import torch._dynamo.exc

    assert is_compiler_error(torch._dynamo.exc.Unsupported("a graph break"))
    assert not is_compiler_error(torch._dynamo.exc.Unsupported("CUDA out of memory"))
    assert not is_compiler_error(RuntimeError("CUDA error: misaligned address"))


def test_what_was_compiled_is_counted_with_its_time():
    import torch

    def halved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2

    call, before = torch.compile(halved, backend="eager", dynamic=False), compiled_so_far()
    for size in (2, 3, 2):
        call(torch.ones(size))

    after = compiled_so_far()
    assert after.functions - before.functions == 2
    assert after.seconds > before.seconds
