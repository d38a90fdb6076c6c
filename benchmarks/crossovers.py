"""Our products against PyTorch's, over many shapes: which one is faster where?

    python -m benchmarks.crossovers [--threads 1] [--dtype float32]

For each product of a layer (its output, and the gradients of its input and weight) this prints
PyTorch's time over that of fastnn's own kernels, for rows x features -> features. The rules in
csrc/cpu/gemm.cpp come from such tables, one for each instruction set, because the library's kernels
differ, too: benchmarks/results/crossovers.txt has them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Function, Inputs, normal
from benchmarks.cases.linear_relu import PARTS
from benchmarks.machine import machine_facts
from benchmarks.table import threads_text
from benchmarks.timing import QUICK, measure

ROWS = (1, 2, 4, 8, 16, 64, 512, 4096)
FEATURES = ((1, 64), (4, 4), (64, 1), (64, 64), (784, 10), (784, 128), (1000, 1000), (2048, 4096))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _ours(grad: Tensor, input: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    return torch.ops.fastnn.linear_relu(input, weight)


def _torchs(grad: Tensor, input: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    return F.relu(F.linear(input, weight))


PRODUCTS = {
    "output": (_ours, _torchs),
    "gradient of input": PARTS["input"],
    "gradient of weight": PARTS["weight"],
}


def ratio(
    functions: tuple[Callable, Callable], rows: int, ins: int, outs: int, dtype: torch.dtype
) -> float:
    """PyTorch's time over ours."""
    generator = torch.Generator().manual_seed(rows)
    contenders = [
        Function(name, function)
        for name, function in zip(("ours", "torch"), functions, strict=True)
    ]

    def draw() -> dict:
        grad = normal(generator, rows, outs, dtype=dtype)
        input = normal(generator, rows, ins, dtype=dtype)
        weight = normal(generator, outs, ins, dtype=dtype, scale=ins**-0.5)
        output = normal(generator, rows, outs, dtype=dtype).relu()
        inputs = Inputs((grad, input, weight, output))
        return {contender.name: contender.sampler(inputs) for contender in contenders}

    times = measure(draw, QUICK, random.Random(0))
    return times["torch"].median / times["ours"].median


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossovers", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    os.environ["FASTNN_CPU_GEMM"] = "tiled"  # read at the first product
    machine = machine_facts()
    print("{cpu}, torch {torch}, {date}".format(**machine))
    print(f"{options.dtype}, {threads_text(options.threads)}: PyTorch's time / that of our kernels")
    with torch.no_grad():
        for name, functions in PRODUCTS.items():
            print(f"\n{name:20}" + "".join(f"{ins:>6}->{outs:<5}" for ins, outs in FEATURES))
            for rows in ROWS:
                row = [ratio(functions, rows, *sizes, DTYPES[options.dtype]) for sizes in FEATURES]
                print(f"{rows:6} rows         " + "".join(f"{value:13.2f}" for value in row))
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
