"""Collects the facts for a bug report: ``python -m fastnn.env`` prints them, one per line.

>>> from fastnn import env
>>> env.collect()["extension"].split(":")[0] in ("available", "not available")
True
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastnn
from fastnn import _extension

__all__ = ["collect", "main"]

UNKNOWN = "unknown"
PREFIXES = ("FASTNN_", "CUDA_", "TORCH_", "PYTORCH_", "KMP_", "LD_PRELOAD")


def collect() -> dict[str, str]:
    """Collects what fastnn runs on: versions, processor, the built extension, threads, CUDA.

    Returns:
        The name and value of each fact, in printing order. Facts that this machine doesn't reveal
        are ``"unknown"``; none is missing.

    >>> import fastnn
    >>> from fastnn import env
    >>> env.collect()["fastnn"] == fastnn.__version__
    True
    """
    build = _extension.build_info()
    return {
        "fastnn": fastnn.__version__,
        "installed as": _installed_version("fastnn"),
        "torch": torch.__version__,
        "numpy": _installed_version("numpy"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "system": _system(),
        "cpu": _cpu_model(),
        "memory": _memory(),
        "huge pages": _huge_pages(),
        "extension": _extension_state(),
        "built for torch": build.get("torch", UNKNOWN),
        "compiler": build.get("compiler", UNKNOWN),
        "build flags": build.get("flags", UNKNOWN),
        "instruction sets built": ", ".join(build.get("simd_targets", {})) or UNKNOWN,
        "instruction set in use": _cpu_capability(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "libraries of torch": _torch_libraries(),
        "threads": f"{torch.get_num_threads()} on {_usable_processors()} processors",
        "environment": _environment(),
        "cuda of fastnn": _own_cuda(build),
        "cuda of torch": _torch_cuda(),
    }


def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Prints :func:`collect`'s facts, one per line.

    >>> from fastnn import env
    >>> env.main()  # doctest: +ELLIPSIS
    fastnn ...
    """
    facts = collect()
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _cpu_model() -> str:
    """The processor's trade name; on Linux and macOS ``platform`` only knows its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine() or UNKNOWN


def _system() -> str:
    """The distribution's name, or else the operating system's."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system() or UNKNOWN


def _memory() -> str:
    """The amount of installed memory."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN
    return f"{pages / 2**30:.1f} GiB"


def _huge_pages() -> str:
    """Linux's setting of transparent huge pages, which large results ask for."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        return setting.read_text().partition("[")[2].partition("]")[0] or UNKNOWN
    except OSError:
        return UNKNOWN


def _usable_processors() -> str:
    """How many processors this process may use, and how many there are if that is more."""
    count = str(os.cpu_count())
    if not hasattr(os, "sched_getaffinity"):
        return count
    usable = str(len(os.sched_getaffinity(0)))
    return count if usable == count else f"{usable} of {count}"


def _torch_libraries() -> str:
    """The libraries that PyTorch uses for products and threads."""
    libraries = {
        "MKL": torch.backends.mkl.is_available(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "OpenMP": torch.backends.openmp.is_available(),
    }
    return ", ".join(name for name, there in libraries.items() if there) or "none"


def _extension_state() -> str:
    if _extension.extension is not None:
        return "available"
    return f"not available: {_extension.unavailable_reason}"


def _cpu_capability() -> str:
    """The instruction set of the kernels in use; "none" without the extension."""
    if _extension.extension is None:
        return "none"
    return _extension.extension.cpu_capability()


def _environment() -> str:
    """The environment variables that change what runs."""
    names = sorted(n for n in os.environ if n.startswith(PREFIXES) or n.endswith("_NUM_THREADS"))
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "nothing set"


def _own_cuda(build: dict[str, Any]) -> str:
    """The toolkit that fastnn was built with, and the compute capabilities it was built for."""
    if not build.get("cuda"):
        return "not built"
    return f"built with {build.get('cuda_toolkit')} for {build.get('cuda_architectures')}"


def _torch_cuda() -> str:
    if torch.version.cuda is None:
        return "not built"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    devices = [_device(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(devices)}"


def _device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"


if __name__ == "__main__":
    main()
