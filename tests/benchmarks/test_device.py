"""benchmarks.device: which device the cases run on, and the facts about it."""

from __future__ import annotations

import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

import fastnn
from benchmarks import __main__ as cli
from benchmarks import case as case_module
from benchmarks.cases import all_cases, linear_relu
from benchmarks.device import CPU, CUDA, Cuda
from fastnn import _extension
from support.benchmark_fakes import FakeGpu, raiser

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_the_driver_is_named_where_nvidia_smi_tells_it(monkeypatch):
    def says(*command, **options) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 0, stdout="580.1\n580.1\n")

    monkeypatch.setattr(subprocess, "run", says)
    assert FakeGpu().device().facts()["gpu driver"] == "580.1"
    monkeypatch.setattr(subprocess, "run", raiser(FileNotFoundError("nvidia-smi")))
    assert FakeGpu().device().facts()["gpu driver"] == "unknown"


def test_a_gpus_compiler_trusts_no_choice_made_while_others_compiled():
    from torch._inductor import config

    before = config.autotune_local_cache
    CPU.prepare_compiler()
    assert config.autotune_local_cache == before
    try:
        FakeGpu().device().prepare_compiler()
        assert not config.autotune_local_cache
    finally:
        config.autotune_local_cache = before


@pytest.mark.parametrize(
    ("is_available", "build_info", "message"),
    [
        (False, {"cuda": True}, "needs a CUDA device that torch can use, and torch finds none"),
        (True, {"cuda": False}, "needs fastnn's CUDA part, and fastnn was built without it"),
    ],
)
def test_cuda_that_can_not_be_used_ends_in_one_sentence(
    is_available: bool, build_info: dict, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(_extension, "build_info", lambda: build_info)
    assert cli.main(["--device", "cuda", "--filter", "SGD"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"benchmarks: error: --device cuda {message}"


def test_cuda_with_a_device_and_the_kernels_has_no_complaint(monkeypatch):
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda": True})
    assert Cuda(SimpleNamespace(is_available=lambda: True)).complaint() is None
    assert CPU.complaint() is None


def test_tf32_has_a_name_of_its_own_and_ends_with_its_case():
    (case,) = (case for case in all_cases(CUDA) if case.key.endswith("4096 tf32 forward"))
    assert case.dtype == torch.float32 and case.tf32
    before = torch.get_float32_matmul_precision()
    with case_module.tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with case_module.tf32(False):
        assert torch.get_float32_matmul_precision() == before


def test_products_are_chosen_for_one_call(monkeypatch):
    chosen: list[str] = []
    variable = linear_relu.PRODUCT_VARIABLE
    monkeypatch.setattr(
        fastnn.functional, "linear_relu", lambda: chosen.append(os.environ[variable])
    )
    monkeypatch.setenv(variable, "auto")
    linear_relu._by_product("tiled")()
    assert chosen == ["tiled"] and os.environ[variable] == "auto"
