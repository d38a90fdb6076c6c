"""The facts that a result depends on; none identifies the machine or its user."""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
from collections.abc import Mapping

import torch

import fastnn
from fastnn import env


def machine_facts() -> dict[str, str]:
    """Processor, system and versions, as recorded with the results."""
    facts = env.collect()
    limit = instruction_set_limit()
    return {
        "cpu": facts["cpu"] + (f" limited to {limit.upper()}" if limit else ""),
        "processors": str(os.cpu_count()),
        "os": f"{facts['system']}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnn": fastnn.__version__,
        "capability": facts["instruction set in use"],
        "capability of torch": facts["instruction set of torch"],
        "date": datetime.date.today().isoformat(),
    }


def instruction_set_limit() -> str:
    """What the environment limits the CPU kernels to; empty if nothing."""
    return os.environ.get("FASTNN_CPU_CAPABILITY", "")


def compiler_cache() -> Mapping[str, str]:
    """Each limit's own cache: inductor's key of its code lacks the instruction set."""
    limit, variable = instruction_set_limit(), "TORCHINDUCTOR_CACHE_DIR"
    if not limit or variable in os.environ:
        return {}
    return {variable: f"{tempfile.gettempdir()}/torchinductor_fastnn_{limit}"}


def available_bytes() -> float:
    """The memory available without swapping; infinite if the system doesn't say."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")
