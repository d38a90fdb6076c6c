"""What tools/cuda_build.py reads from a library's kernels."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest

from repository import REPOSITORY

TOOLS = REPOSITORY / "tools"

# A loop over a row: head and end, two inner loops, and a rare branch of one of them.
SASS = """
        Function : row
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128.CONSTANT R8, desc[UR4][R6.64] ;
        /*0040*/              @!P1 BRA 0x60 ;
        /*0050*/                   FADD R9, R9, R8 ;
        /*0060*/                   FADD R9, R9, R4 ;
        /*0070*/               @P0 BRA 0x20 ;
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/               @P0 BRA 0x80 ;
        /*00a0*/               @P2 BRA 0x10 ;
        /*00b0*/                   EXIT ;
        Function : none
        /*0000*/                   EXIT ;
"""


USAGES = """
Fatbin elf code:
================
arch = sm_75
code version = [1,7]

Resource usage:
 Common:
  GLOBAL:0
 Function row:
  REG:64 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function none:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
code version = [1,7]

Resource usage:
 Common:
  GLOBAL:0
 Function row:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("cuda_build", TOOLS / "cuda_build.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_build", module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_instructions_for_an_element(cuda_build) -> None:
    """Counts the loop with two loads of eight elements each, not the code around or beside it."""
    row, none = cuda_build.read_sass(SASS)
    assert row.instructions_for_an_element() == 6 / (2 * 8)
    assert none.instructions_for_an_element() == math.inf


def test_too_many_instructions_are_a_problem(cuda_build, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cuda_build, "WIDE_LOADS", [])
    monkeypatch.setattr(cuda_build, "WIDE_STORES", [])
    kernels = list(cuda_build.read_sass(SASS))
    monkeypatch.setattr(cuda_build, "MOST_INSTRUCTIONS", [("row", 1)])
    monkeypatch.setattr(cuda_build, "LOADS_AT_ONCE", [])
    cuda_build.check_kernels(kernels)
    assert "1 kernels row take 0.4 instructions" in capsys.readouterr().out
    monkeypatch.setattr(cuda_build, "MOST_INSTRUCTIONS", [("row", 0.3), ("absent", 1)])
    with pytest.raises(SystemExit, match=r"row takes 0\.4 instructions") as error:
        cuda_build.check_kernels(kernels)
    assert "there is no kernel absent" in str(error.value)


def test_loads_before_a_store(cuda_build) -> None:
    row, none = cuda_build.read_sass(SASS)
    assert (row.loads_at_once(), none.loads_at_once()) == (3, 0)
    stored = SASS.replace("FADD R9, R9, R8", "STG.E.128 desc[UR4][R2.64], R4")
    assert next(cuda_build.read_sass(stored)).loads_at_once() == 2


def test_too_few_loads_before_a_store_are_a_problem(cuda_build, monkeypatch) -> None:
    for gate in ("WIDE_LOADS", "WIDE_STORES", "MOST_INSTRUCTIONS"):
        monkeypatch.setattr(cuda_build, gate, [])
    monkeypatch.setattr(cuda_build, "LOADS_AT_ONCE", [("row", 4)])
    with pytest.raises(SystemExit, match="row has 3 loads before a store, not 4"):
        cuda_build.check_kernels(list(cuda_build.read_sass(SASS)))


def test_spills_are_a_problem(cuda_build, capsys) -> None:
    with pytest.raises(SystemExit, match="row spills registers for sm_75: 8 bytes of local memory"):
        cuda_build.check_spills(list(cuda_build.read_resource_usages(USAGES)))
    cuda_build.check_spills(
        list(cuda_build.read_resource_usages(USAGES.replace("STACK:8", "STACK:0")))
    )
    assert "  2 kernels for sm_75\n  1 kernels for sm_80" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no kernel"):
        cuda_build.check_spills([])
