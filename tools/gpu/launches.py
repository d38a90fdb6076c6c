"""Launches every CUDA kernel of fastnn on each of its paths, for compute-sanitizer to check.

    compute-sanitizer --tool memcheck python tools/gpu/launches.py

Sizes are small and odd, so that vectors, tiles and slices have partial ends. Results are tested
elsewhere. ``--no-library`` leaves out cuBLAS: its kernels make racecheck fail, and their results
count as unwritten when initcheck watches only ours. For the same reason the inputs come from the
host, and so do the gradients that a backward starts from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

import fastnn
from fastnn import functional
from fastnn._extension import build_info

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW_PATHS = ("subwarp", "warp", "block", "split")
LINEARS = (functional.linear, functional.linear_relu)
# (rows, depth, columns)
PRODUCTS = ((1, 9, 7), (33, 64, 65), (130, 72, 264), (300, 31, 8))


def mlp(input: Tensor, weight: Tensor, bias: Tensor, last: Tensor) -> Tensor:
    """Two layers, the last without a bias."""
    return functional.mlp(input, [weight, last], [bias, None])


def main() -> None:
    parser = argparse.ArgumentParser(description="Launch every CUDA kernel on each of its paths.")
    parser.add_argument("--device", default="cuda", help="cpu: a dry run")
    parser.add_argument("--no-library", dest="library", action="store_false")
    options = parser.parse_args()
    check_kernels(options.device)
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        launches = Launches(generator, dtype, options.device)
        launches.rows()
        launches.strided_rows()
        launches.products()
        if options.library:
            launches.library_products()
            launches.heads()
        launches.steps()
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"launched on {options.device}")


def check_kernels(device: str) -> None:
    """Exits if kernels other than ours would run."""
    if device == "cuda" and not (fastnn.is_available() and build_info().get("cuda")):
        sys.exit("fastnn is built without its CUDA part here, so there is nothing to check.")


class Launches:
    """The launches in one dtype."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> None:
        self.generator, self.dtype, self.device = generator, dtype, device

    def normal(self, *shape: int, offset: int = 0) -> Tensor:
        """Random values on the device, ``offset`` elements past the start of their memory."""
        size = torch.Size(shape).numel()
        values = torch.randn(size + offset, generator=self.generator).to(self.dtype)
        return values.to(self.device)[offset:].view(shape)

    def targets(self, classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=self.generator).to(self.device)

    def rows(self) -> None:
        """Contiguous rows: each path, with sizes on both sides of those it is meant for."""
        for path in ROW_PATHS:
            with environment("FASTNN_CUDA_ROWS", path):
                for rows, classes, offset in ((1, 1, 0), (7, 10, 1), (33, 257, 0), (5, 1031, 3)):
                    self.losses((rows, classes), offset)
        # Rows that just fit a block's shared memory, or just don't; the launchers choose the path.
        for kibibytes in (46, 49):
            self.losses((2, kibibytes * 1024 // self.dtype.itemsize), 0)

    def strided_rows(self) -> None:
        for shape in ((2, 21, 5, 7), (1, 300, 3)):
            self.losses(shape, 0)

    def losses(self, shape: tuple[int, ...], offset: int) -> None:
        """log_softmax and the losses over logits of a shape, forward and backward."""
        logits = self.normal(*shape, offset=offset)
        classes, rows = shape[1], (shape[0], *shape[2:])
        target, weight = self.targets(classes, *rows), self.normal(classes).abs_()
        self.backward(functional.log_softmax, [logits], shape, 1)
        for loss in (functional.nll_loss, functional.cross_entropy):
            self.backward(loss, [logits], rows, target, reduction="none")
            self.backward(loss, [logits], (), target, weight=weight)
        self.backward(functional.cross_entropy, [logits], (), target, label_smoothing=0.1)
        probabilities = self.normal(*shape, offset=offset).abs_()
        self.backward(functional.cross_entropy, [logits], (), probabilities, weight=weight)

    def products(self) -> None:
        """Our GEMM; then the mask and the bias gradient, with inputs that have no features."""
        with environment("FASTNN_CUDA_GEMM", "tiled"), torch.no_grad():
            for rows, depth, cols in PRODUCTS:
                args = self.normal(rows, depth), self.normal(cols, depth), self.normal(cols)
                for linear in LINEARS:
                    linear(*args)
                    linear(*args[:2])
        for rows, cols, offset in ((1, 7, 0), (33, 64, 0), (700, 81, 3), (3000, 40, 1)):
            leaves = [self.normal(rows, 0), self.normal(cols, 0), self.normal(cols)]
            for linear in LINEARS:
                self.backward(linear, leaves[:2], (rows, cols))
                self.backward(linear, leaves, (rows, cols), offset=offset)

    def library_products(self) -> None:
        with environment("FASTNN_CUDA_GEMM", "library"):
            for rows, depth, cols in PRODUCTS:
                leaves = [self.normal(rows, depth), self.normal(cols, depth), self.normal(cols)]
                for linear in LINEARS:
                    self.backward(linear, leaves, (rows, cols))
                self.backward(mlp, [*leaves, self.normal(5, cols)], (rows, 5))

    def heads(self) -> None:
        """A head and its loss, on each path of its rows; the library computes the products."""
        for path in ROW_PATHS:
            with environment("FASTNN_CUDA_ROWS", path):
                for rows, classes in ((3, 1), (7, 10), (2100, 33), (5, 1031)):
                    self.head(rows, classes)

    def head(self, rows: int, classes: int) -> None:
        leaves = [self.normal(rows, 16), self.normal(classes, 16)]
        bias, weight = self.normal(classes), self.normal(classes).abs_()
        target = self.targets(classes, rows)
        probabilities = self.normal(rows, classes).softmax(1)
        head, options = functional.linear_cross_entropy, {"softcap": 5.0, "z_loss": 0.1}
        self.backward(head, leaves, (), target, linear_bias=bias, weight=weight)
        for reduction, shape in (("mean", ()), ("none", (rows,))):
            self.backward(head, leaves, shape, target, reduction=reduction, **options)
            self.backward(head, leaves, shape, target, reduction=reduction, label_smoothing=0.1)
            self.backward(head, leaves, shape, probabilities, reduction=reduction)
        with torch.no_grad():
            head(*leaves, target)

    def backward(
        self, function, inputs: Sequence[Tensor], shape, *args, offset: int = 0, **kwargs
    ) -> None:
        """Calls the function and computes its inputs' gradients from a random incoming one."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*leaves, *args, **kwargs)
        torch.autograd.grad(output, leaves, self.normal(*shape, offset=offset))

    def steps(self) -> None:
        """SGD over few and many tensors, at several alignments and lengths."""
        for sizes in ((7, 100_003), range(1, 120)):
            self.steps_of([self.normal(size, offset=size % 3) for size in sizes])

    def steps_of(self, values: Sequence[Tensor]) -> None:
        for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "float32_momentum": True}):
            params = [torch.nn.Parameter(value.clone()) for value in values]
            optimizer = fastnn.optim.SGD(params, lr=0.1, weight_decay=0.01, **options)
            for _ in range(2):
                for param, value in zip(params, values, strict=True):
                    param.grad = value.clone()
                optimizer.step()


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable, which the launchers read at each call."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


if __name__ == "__main__":
    main()
