"""What the GPU can do: the rates of copies and of matrix products, as JSON."""

from __future__ import annotations

import json

from benchmarks.device import CUDA
from benchmarks.limits import measure_limits

if __name__ == "__main__":
    limits = measure_limits(CUDA.limit_seconds(CUDA.full_plan), CUDA)
    print(json.dumps(CUDA.facts() | limits, indent=1))
