"""Finds the CUDA toolkit to build with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# These serve every GPU since Turing: one that isn't listed runs the code of the nearest lower
# capability of its generation; a newer generation compiles the last one's PTX when it first loads
# it. Those that the toolkit doesn't know are left out.
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
EXAMPLE = f"{';'.join(ARCHITECTURES)}+PTX"

# A compute capability, or a generation's name such as Ampere.
ARCHITECTURE = re.compile(r"(\d+\.\d)a?(\+PTX)?|[A-Z][a-z]+(\+[A-Z][a-z]+)?")

USUAL_NVCC = "/usr/local/cuda/bin/nvcc"

FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden"]


class NotBuildable(Exception):
    """Why the CUDA part can't be built: one sentence that says what to do."""


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str
    architectures: str


def find(torch_version: str, torch_cuda: str | None, environment: Mapping[str, str]) -> Toolkit:
    """The toolkit for a torch that was built with CUDA ``torch_cuda``; raises NotBuildable."""
    if torch_cuda is None:
        raise NotBuildable(
            f"torch {torch_version} is built without CUDA; install a CUDA build of torch or set "
            "FASTNN_CUDA=0."
        )
    nvcc = _find_nvcc(torch_cuda, environment)
    version = _version(nvcc)
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise NotBuildable(
            f"{nvcc} is of CUDA {version} and torch {torch_version} was built with CUDA "
            f"{torch_cuda}; point CUDA_HOME to a toolkit of CUDA {torch_cuda} or set FASTNN_CUDA=0."
        )
    return Toolkit(_home(nvcc), version, _architectures(nvcc, environment))


def _architectures(nvcc: Path, environment: Mapping[str, str]) -> str:
    """The architectures to build for, in torch's format: separated by semicolons."""
    known = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc, "--list-gpu-arch"))
    named = environment.get("TORCH_CUDA_ARCH_LIST")
    if named is None:
        usual = [name for name in ARCHITECTURES if tuple(name.split(".")) in known]
        if not usual:
            raise NotBuildable(f"{nvcc} can build for none of {', '.join(ARCHITECTURES)}.")
        return f"{';'.join(usual)}+PTX"
    names = named.replace(";", " ").split()
    if not names:
        raise NotBuildable(
            "TORCH_CUDA_ARCH_LIST is empty; unset it to build for "
            f"{EXAMPLE}, or name your GPU's compute capability in it (such as 8.0)."
        )
    for name in names:
        match = ARCHITECTURE.fullmatch(name)
        if match is None:
            raise NotBuildable(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; it must name compute capabilities, separated "
                f"by semicolons, such as {EXAMPLE}."
            )
        if match[1] and tuple(match[1].split(".")) not in known:
            capabilities = ", ".join(".".join(pair) for pair in known)
            raise NotBuildable(
                f"TORCH_CUDA_ARCH_LIST has {name!r}, for which {nvcc} can't build; it can for "
                f"{capabilities}."
            )
    return ";".join(names)


def _find_nvcc(torch_cuda: str, environment: Mapping[str, str]) -> Path:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        nvcc = Path(home) / "bin/nvcc"
        if not nvcc.exists():
            raise NotBuildable(
                f"there is no nvcc at {nvcc}; point CUDA_HOME to a toolkit of CUDA {torch_cuda}, "
                "or unset it to use the nvcc on the PATH."
            )
        return nvcc
    found = shutil.which("nvcc", path=environment.get("PATH", ""))
    for candidate in (found, USUAL_NVCC):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    raise NotBuildable(
        f"no nvcc was found; install the toolkit of CUDA {torch_cuda}, point CUDA_HOME to where it "
        "is, or set FASTNN_CUDA=0."
    )


def _version(nvcc: Path) -> str:
    output = _output(nvcc, "--version")
    match = re.search(r"release (\d+\.\d+)", output)
    if match is None:
        raise NotBuildable(f"{nvcc} does not tell its version; reinstall the CUDA toolkit.")
    return match.group(1)


def _home(nvcc: Path) -> Path:
    """The toolkit's own folder: the nvcc on the PATH may be a wrapper somewhere else."""
    dry_run = _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
    match = re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE)
    return Path(match.group(1)).parent if match else nvcc.resolve().parent.parent


def _output(nvcc: Path, *arguments: str) -> str:
    try:
        process = subprocess.run(
            [str(nvcc), *arguments], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise NotBuildable(f"{nvcc} can't be run ({error}); reinstall the CUDA toolkit.") from error
    return process.stdout + process.stderr
