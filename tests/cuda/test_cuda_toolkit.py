"""build_support.cuda_toolkit: which toolkit builds the CUDA part, and the message if none does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_cuda_arch_flags

from repository import REPOSITORY

sys.path.insert(0, str(REPOSITORY))  # build_support is not installed with the package

from build_support.cuda_toolkit import NotBuildable, find

pytestmark = pytest.mark.cpu_only("the build")


def make_nvcc(
    home: Path, release: str = "13.0", script: str | None = None, known: str = "75 80 86 90 100 120"
) -> Path:
    """An nvcc that reports its version and folder like a real one."""
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        script
        or f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--dryrun) echo "#\\$ _HERE_=$(dirname "$0")" >&2 ;;
--list-gpu-arch) for sm in {known}; do echo compute_$sm; done ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return nvcc


def environment(**variables: object) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **{k: str(v) for k, v in variables.items()}}


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_that_a_variable_names(tmp_path, variable):
    make_nvcc(tmp_path)
    toolkit = find("2.14.1", "13.0", environment(**{variable: tmp_path}))
    assert (toolkit.home, toolkit.version) == (tmp_path, "13.0")
    assert toolkit.architectures == "7.5;8.0;8.6;9.0;10.0;12.0+PTX"


def test_an_older_toolkit_builds_for_the_gpus_that_it_knows(tmp_path):
    make_nvcc(tmp_path, "12.6", known="50 75 80 86 89 90")
    toolkit = find("2.9.1", "12.6", environment(CUDA_HOME=tmp_path))
    assert toolkit.architectures == "7.5;8.0;8.6;9.0+PTX"


def test_a_toolkit_that_knows_none_of_the_gpus(tmp_path):
    make_nvcc(tmp_path, "12.6", known="50 60")
    assert "can build for none of 7.5, 8.0" in sentence("12.6", environment(CUDA_HOME=tmp_path))


def test_toolkit_behind_a_wrapper_on_the_path(tmp_path):
    """Its headers are in its own folder, not next to the wrapper."""
    nvcc = make_nvcc(tmp_path / "toolkit")
    make_nvcc(tmp_path / "wrapper", script=f'#!/bin/sh\nexec {nvcc} "$@"\n')
    path = f"{tmp_path / 'wrapper/bin'}:{os.environ['PATH']}"
    assert find("2.14.1", "13.0", {"PATH": path}).home == tmp_path / "toolkit"


def test_another_minor_version_will_do(tmp_path):
    make_nvcc(tmp_path, "13.1")
    assert find("2.14.1", "13.0", environment(CUDA_HOME=tmp_path)).version == "13.1"


def test_architectures_that_a_variable_names(tmp_path):
    make_nvcc(tmp_path)
    variables = environment(CUDA_HOME=tmp_path, TORCH_CUDA_ARCH_LIST="8.0+PTX")
    assert find("2.14.1", "13.0", variables).architectures == "8.0+PTX"


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ("7.5 8.0", "7.5;8.0"),
        (" 8.0; 9.0a;;12.0+PTX;", "8.0;9.0a;12.0+PTX"),
        ("Turing;Ampere+Tegra", "Turing;Ampere+Tegra"),
    ],
)
def test_architectures_as_torch_takes_them(tmp_path, monkeypatch, named, taken):
    make_nvcc(tmp_path)
    variables = environment(CUDA_HOME=tmp_path, TORCH_CUDA_ARCH_LIST=named)
    assert find("2.14.1", "13.0", variables).architectures == taken
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", taken)
    assert len(_get_cuda_arch_flags()) >= 2


@pytest.mark.parametrize("name", ["7.0", "99.9+PTX"])
def test_architecture_that_nvcc_does_not_know(tmp_path, name):
    nvcc = make_nvcc(tmp_path)
    message = sentence("13.0", environment(CUDA_HOME=tmp_path, TORCH_CUDA_ARCH_LIST=name))
    assert f"has {name!r}, for which {nvcc} can't build; it can for 7.5, 8.0, 8.6" in message


def sentence(torch_cuda: str | None, variables: dict[str, str]) -> str:
    with pytest.raises(NotBuildable) as raised:
        find("2.14.1", torch_cuda, variables)
    message = str(raised.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_torch_without_cuda(tmp_path):
    make_nvcc(tmp_path)
    message = sentence(None, environment(CUDA_HOME=tmp_path))
    assert "torch 2.14.1 is built without CUDA" in message and "FASTNN_CUDA=0" in message


def test_toolkit_of_another_version(tmp_path):
    nvcc = make_nvcc(tmp_path, "12.8")
    message = sentence("13.0", environment(CUDA_HOME=tmp_path))
    assert f"{nvcc} is of CUDA 12.8 and torch 2.14.1 was built with CUDA 13.0" in message


def test_folder_without_nvcc(tmp_path):
    message = sentence("13.0", environment(CUDA_HOME=tmp_path))
    assert f"there is no nvcc at {tmp_path / 'bin/nvcc'}" in message


def test_no_nvcc_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setitem(find.__globals__, "USUAL_NVCC", str(tmp_path / "nvcc"))
    message = sentence("13.0", {"PATH": str(tmp_path)})
    assert "no nvcc was found" in message and "install the toolkit of CUDA 13.0" in message


@pytest.mark.parametrize("architectures", ["", " ", ";"])
def test_no_architectures(tmp_path, architectures):
    make_nvcc(tmp_path)
    variables = environment(CUDA_HOME=tmp_path, TORCH_CUDA_ARCH_LIST=architectures)
    assert "TORCH_CUDA_ARCH_LIST is empty" in sentence("13.0", variables)


@pytest.mark.parametrize("name", ["banana", "80", "8.0,9.0", "sm_80", "12.0f", "Ada+PTX"])
def test_what_is_no_architecture(tmp_path, name):
    make_nvcc(tmp_path)
    variables = environment(CUDA_HOME=tmp_path, TORCH_CUDA_ARCH_LIST=f"8.0;{name}")
    assert f"TORCH_CUDA_ARCH_LIST has {name!r}" in sentence("13.0", variables)


def test_nvcc_that_does_not_tell_its_version(tmp_path):
    make_nvcc(tmp_path, script="#!/bin/sh\n")
    assert "does not tell its version" in sentence("13.0", environment(CUDA_HOME=tmp_path))


def test_nvcc_that_is_no_program(tmp_path):
    make_nvcc(tmp_path, script="neither a script nor a program")
    assert "can't be run" in sentence("13.0", environment(CUDA_HOME=tmp_path))
