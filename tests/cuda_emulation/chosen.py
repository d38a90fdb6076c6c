"""Whether the tests run over the CUDA launchers and kernels, emulated on the CPU.

``FASTNN_TEST_CUDA_EMULATION=1`` says so. Imported before fastnn, this module then puts the
emulated extension in the place of fastnn's own.
"""

from __future__ import annotations

import os

EMULATES_CUDA = os.environ.get("FASTNN_TEST_CUDA_EMULATION", "0") not in ("", "0")

if EMULATES_CUDA:
    from cuda_emulation import build

    build.load()
