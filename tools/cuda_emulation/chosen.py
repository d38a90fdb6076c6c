"""Whether the tests run over the CUDA launchers and kernels, emulated on the CPU.

``FASTNN_TEST_CUDA_EMULATION=1`` turns this on; with ``=ptx`` the kernels are those that nvcc made.
Imported before fastnn, this module then replaces fastnn's own extension by the emulated one.
"""

from __future__ import annotations

import os

CHOICE = os.environ.get("FASTNN_TEST_CUDA_EMULATION", "")
if CHOICE not in ("", "0", "1", "ptx"):
    raise ValueError(f"FASTNN_TEST_CUDA_EMULATION must be 0, 1 or ptx, not {CHOICE!r}")
EMULATES_CUDA = CHOICE in ("1", "ptx")
EXECUTES_PTX = CHOICE == "ptx"

if EMULATES_CUDA:
    from cuda_emulation import build

    build.load(build.PTXEmulation() if EXECUTES_PTX else build.Emulation())
