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

import torch

import fastnn
from fastnn import _extension

__all__ = ["collect", "main"]

UNKNOWN = "unknown"


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
        "torch": torch.__version__,
        "numpy": _installed_version("numpy"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "extension": _extension_state(),
        "built for torch": build.get("torch", UNKNOWN),
        "compiler": build.get("compiler", UNKNOWN),
        "build flags": build.get("flags", UNKNOWN),
        "instruction sets built": ", ".join(build.get("simd_targets", {})) or UNKNOWN,
        "instruction set in use": _cpu_capability(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "environment": _environment(),
        "cuda of fastnn": "built" if build.get("cuda") else "not built",
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
    names = sorted(n for n in os.environ if n.startswith("FASTNN_") or n.endswith("_NUM_THREADS"))
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "nothing set"


def _torch_cuda() -> str:
    if torch.version.cuda is None:
        return "not built"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(devices)}"


if __name__ == "__main__":
    main()
