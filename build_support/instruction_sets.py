"""How kernels.cpp is compiled, once for each instruction set: by setup.py and by its own tests."""

from __future__ import annotations

SOURCE = "csrc/cpu/simd/kernels.cpp"

# kernels.cpp is compiled once for each instruction set, the best of which is chosen at run time:
# nothing else is compiled for more than the architecture's baseline, so that the library starts on
# any CPU.
_X86_TARGETS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
}

# Of every file of the kernels, whatever it is compiled for. -Wno-psabi: no vector crosses from one
# object to another.
KERNEL_FLAGS = [
    "-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip


def targets(machine: str) -> dict[str, list[str]]:
    """The instruction sets of a machine (as in ``platform.machine()``), each with its flags."""
    return _X86_TARGETS if machine.lower() in ("x86_64", "amd64") else {"generic": []}


def target_flags(machine: str, target: str) -> list[str]:
    """What a file that is compiled once for each instruction set is compiled with for this one."""
    # No exceptions: what handles them would be shared between the objects.
    flags = ["-fno-exceptions", f"-DFASTNN_SIMD_TARGET={target}", "-Icsrc"]
    return [*KERNEL_FLAGS, *targets(machine)[target], *flags]
