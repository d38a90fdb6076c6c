"""What the GPU can do: the rates of copies and of matrix products, as JSON."""

from __future__ import annotations

import json

from benchmarks.device import CUDA
from benchmarks.limits import measure_limits

if __name__ == "__main__":
    print(json.dumps(CUDA.facts() | measure_limits(0.1, CUDA), indent=1))
