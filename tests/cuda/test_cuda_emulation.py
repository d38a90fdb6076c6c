"""CUDA's launchers and kernels on the CPU: the emulation's own tests, and those of the kernels.

With ``FASTNN_TEST_CUDA_EMULATION=1`` the other tests run on the emulated kernels; tests here
verify that they do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn
from cuda_emulation import build
from cuda_emulation.chosen import EMULATES_CUDA
from cuda_emulation.ptx.translate import UnsupportedPTX, translate
from repository import REPOSITORY
from support.marks import needs_extension

RUN = REPOSITORY / "tools/cuda_emulation/run.py"


@pytest.mark.cpu_only("they build programs of their own")
@pytest.mark.parametrize("program", ["self_tests", "kernels", "ptx_tests"])
def test_programs(program):
    command = [sys.executable, str(RUN), "plain", "--only", program]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


PTX = """
.visible .entry kernel(
.param .u64 kernel_param_0
)
{{
.reg .b32 %r<3>;
.reg .b64 %rd<3>;

{statement}
ret;

}}
"""


def translated(folder: Path, statement: str) -> str:
    path = folder / "kernel.ptx"
    path.write_text(PTX.format(statement=statement))
    return "".join(translate(path))


@pytest.mark.cpu_only("nothing runs")
@pytest.mark.parametrize(
    "statement",
    [
        "mov.u32 %r1, %clock64.x;",
        "ld.global.u32 %r1, [%rd1+%rd2];",
        ".local .align 4 .b8 memory[4];",
        "atom.global.add.u32 %r1, [%rd1], 1;",
        "bar.sync 0, 64;",
        "setp.lt.s32 %p1|%p2, %r1, %r2;",
        "mov.f32 %f1, 0f3F80000;",
        "ld.global.v4.u32 {%r1, %r2}, [%rd1];",
        "ld.global.u32 {%r1, %r2}, [%rd1];",
        "st.global.u32 [%rd1], %r1, %r2;",
        "st.param.b64 [param0+8], %rd1;",
        "}",
    ],
)
def test_ptx_of_another_form_is_refused(tmp_path, statement):
    with pytest.raises(UnsupportedPTX):
        translated(tmp_path, statement)


@pytest.mark.cpu_only("nothing runs")
@pytest.mark.parametrize(
    ("known", "other"),
    [
        (".visible .entry", ".entry"),
        (".visible .entry", ".weak .entry"),
        ("\n.visible", "\n .visible"),
        ("\n)\n", "\n)\n.maxclusterrank 8\n"),
        (PTX, ""),
    ],
)
def test_a_module_of_another_form_is_refused(tmp_path, monkeypatch, known, other):
    monkeypatch.setitem(globals(), "PTX", PTX.replace(known, other))
    with pytest.raises(UnsupportedPTX):
        translated(tmp_path, "")


@pytest.mark.cpu_only("nothing runs")
@pytest.mark.parametrize(
    ("directive", "threads"),
    [("", 1024), (".maxntid 64", 64), (".maxntid 64, 2, 1", 128), (".reqntid 32, 1, 1", 32)],
)
def test_the_launch_bound_is_read(tmp_path, monkeypatch, directive, threads):
    monkeypatch.setitem(globals(), "PTX", PTX.replace("\n)\n", f"\n)\n{directive}\n"))
    assert f"{{8}}, {threads});" in translated(tmp_path, "")


@pytest.mark.cpu_only("nothing runs")
@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("add.s32 %r1, %r2, 1;", None),
        ("popc.b32 %r1, %r2;", "popc"),
        ("ld.local.u32 %r1, [%rd1];", "ld_local"),
        ("cvt.f32.f64 %r1, %rd1;", "a rounding is missing"),
    ],
)
def test_an_unknown_instruction_does_not_compile(tmp_path, statement, says):
    source = tmp_path / "kernel.cpp"
    source.write_text(translated(tmp_path, statement))
    command = [build.CXX, *build.PTXEmulation.flags, *build.INCLUDES, "-w", "-fsyntax-only"]
    command = " ".join([*command, str(source)]).split()
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if says is None:
        assert process.returncode == 0, process.stderr
    else:
        assert process.returncode != 0
        assert says in process.stderr
        assert "kernel.ptx:9" in process.stderr  # the faulty line


def step_with_each_operator() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    hidden = fastnn.functional.linear_relu(x, torch.randn(5, 6), torch.randn(5))
    hidden = fastnn.functional.linear(hidden, torch.randn(5, 5))
    target = torch.arange(4)
    loss = fastnn.functional.nll_loss(fastnn.functional.log_softmax(hidden, 1), target)
    (loss + fastnn.functional.cross_entropy(hidden, target)).backward()
    fastnn.optim.SGD([x], lr=0.1).step()


@needs_extension
def test_the_emulated_kernels_run_where_they_are_asked_for():
    if not EMULATES_CUDA:
        assert not hasattr(torch.ops.fastnn_cuda_emulation, "launches")
        return
    launches = torch.ops.fastnn_cuda_emulation.launches
    before = launches()
    step_with_each_operator()
    assert launches() >= before + 8  # a forward and a backward kernel each, plus the step


@pytest.mark.skipif(not EMULATES_CUDA, reason="of the emulated extension")
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_the_same_bits_in_any_order_of_threads(order):
    """Covers rows, columns and whole blocks; the operators' tests compare the values."""
    set_order = torch.ops.fastnn_cuda_emulation.set_thread_order

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(70, 300, requires_grad=True)
        weight = torch.randn(65, 300, requires_grad=True)
        bias = torch.randn(65, requires_grad=True)
        hidden = fastnn.functional.linear_relu(x, weight, bias)
        loss = fastnn.functional.cross_entropy(hidden, torch.arange(70) % 65, label_smoothing=0.1)
        return [loss, *torch.autograd.grad(loss, [x, weight, bias])]

    try:
        set_order("forward")
        expected = results()
        set_order(order, seed=7)
        actual = results()
    finally:
        set_order(os.environ.get("FASTNN_EMULATION_ORDER") or "forward")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
