"""Checks every operator on the device against float64, small and large, and NaN: takes a minute.

    python tools/gpu/smoke.py

Prints a line for each check and goes on after a failure; the exit status is 1 if there was one.
The test suite checks more, but takes longer.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from launches import check_kernels, environment
from torch import Tensor

import fastnn
from fastnn import functional

# The norm of the error over the norm of the result. A few roundings for each dtype; products of
# bfloat16 and float16 may add partial sums that are rounded to it.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
# TF32 rounds the factors to 11 bits.
TF32_TOLERANCE = 2e-3

# (rows, depth, columns): a small product and a large one.
PRODUCTS = ((33, 65, 31), (512, 1000, 776))
# Rows of a head, features, classes: one block, and several.
HEADS = ((300, 65, 31), (5000, 64, 33000))
HEAD_OPTIONS = {
    "mean": {},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "capped": {"softcap": 3.0},
}
LOGITS = ((64, 10), (4096, 257), (1000, 1000), (16, 50257), (4, 21, 64, 65))


class Smoke:
    """The checks, on a device; counts those that fail."""

    def __init__(self, device: str) -> None:
        self.device, self.failures = device, 0
        self.generator = torch.Generator(device).manual_seed(torch.seed() % 2**31)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.to(dtype)

    def run(self) -> None:
        for dtype in TOLERANCES:
            for name, check in self.checks(dtype):
                self.attempt(f"{name} {str(dtype).removeprefix('torch.')}", check)

    def attempt(self, name: str, check: Callable[[], str]) -> None:
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except Exception as error:
            self.failures += 1
            print(f"FAILED  {name}: {str(error).splitlines()[0][:300]}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()

    def checks(self, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], str]]]:
        for shape, kind in product(PRODUCTS, ("tiled", "library")):
            name = f"linear_relu {'x'.join(map(str, shape))} {kind}"
            yield name, lambda s=shape, k=kind: self.linear_relu(s, k, dtype)
            yield name.replace("_relu", ""), lambda s=shape, k=kind: self.linear(s, k, dtype)
            yield name.replace("linear_relu", "mlp"), lambda s=shape, k=kind: self.mlp(s, k, dtype)
            yield f"{name} of NaN", lambda s=shape, k=kind: self.special_values(s, k, dtype)
        yield "ReLU epilogue of the library", lambda: self.library_epilogue(dtype)
        if dtype == torch.float32:
            yield "linear_relu with TF32", lambda: self.tf32(PRODUCTS[-1])
        for shape in LOGITS:
            for name, call in CALLS.items():
                yield f"{name} {tuple(shape)}", lambda s=shape, c=call: self.rows(c, s, dtype)
        for shape, (name, options) in product(HEADS, HEAD_OPTIONS.items()):
            text = f"linear_cross_entropy {'x'.join(map(str, shape))} {name}"
            yield text, lambda s=shape, o=options: self.head(s, o, dtype)
        for options in ({}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}):
            yield f"SGD {options}", lambda o=options: self.sgd(o, dtype)
            yield f"train_step {options}", lambda o=options: self.train_step(o, dtype)

    def linear_relu(self, shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> str:
        with environment("FASTNN_CUDA_GEMM", kind):
            return self.product(shape, dtype, TOLERANCES[dtype])

    def linear(self, shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> str:
        def exact(_value: Tensor, *leaves: Tensor) -> Tensor:
            return F.linear(*leaves)

        leaves = self.product_leaves(shape, dtype)
        with environment("FASTNN_CUDA_GEMM", kind):
            return self.against_float64(functional.linear, exact, leaves, dtype, TOLERANCES[dtype])

    def mlp(self, shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> str:
        """Two layers, so twice the roundings: the values between them are rounded too."""
        input, weight, bias = self.product_leaves(shape, dtype)
        last = self.normal(shape[1], shape[2], dtype=dtype) / shape[2] ** 0.5

        def ours(input: Tensor, weight: Tensor, bias: Tensor, last: Tensor) -> Tensor:
            return functional.mlp(input, [weight, last], [bias, None])

        def exact(_value: Tensor, input: Tensor, weight: Tensor, bias: Tensor, last: Tensor):
            # A value within a rounding error of zero may have either sign: take our ReLU's.
            hidden = functional.linear_relu(*(t.to(dtype) for t in (input, weight, bias)))
            return F.linear(torch.where(hidden > 0, F.linear(input, weight, bias), 0.0), last)

        with environment("FASTNN_CUDA_GEMM", kind):
            leaves = [input, weight, bias, last]
            return self.against_float64(ours, exact, leaves, dtype, 2 * TOLERANCES[dtype])

    def product(self, shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> str:
        def exact(value: Tensor, *leaves: Tensor) -> Tensor:
            # A value within a rounding error of zero may have either sign: take our ReLU's.
            return torch.where(value > 0, F.linear(*leaves), 0.0)

        leaves = self.product_leaves(shape, dtype)
        return self.against_float64(functional.linear_relu, exact, leaves, dtype, tolerance)

    def product_leaves(self, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
        rows, depth, cols = shape
        return [
            self.normal(rows, depth, dtype=dtype),
            self.normal(cols, depth, dtype=dtype) / depth**0.5,
            self.normal(cols, dtype=dtype),
        ]

    def special_values(self, shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> str:
        """NaN and infinities of input, weight and bias come out where they do in float64."""
        input, weight, bias = self.product_leaves(shape, dtype)
        input[3, 5], input[4, 6], input[5, 7] = float("nan"), float("inf"), float("-inf")
        weight[7, 2], weight[8, 3] = float("nan"), float("inf")
        bias[9], bias[10], bias[11] = float("nan"), float("inf"), float("-inf")
        with environment("FASTNN_CUDA_GEMM", kind):
            output = functional.linear_relu(input, weight, bias)
        exact = F.linear(input.double(), weight.double(), bias.double()).relu()
        for name, found, expected in (
            ("NaN", output.isnan(), exact.isnan()),
            ("infinity", output.isinf(), exact.isinf()),
        ):
            wrong = (found != expected).sum().item()
            assert not wrong, f"{wrong} of {expected.sum().item()} {name} are wrong"
        return f"{exact.isnan().sum().item()} NaN and {exact.isinf().sum().item()} infinities pass"

    def library_epilogue(self, dtype: torch.dtype) -> str:
        """Not a check but a fact: does NaN pass the library's own fused ReLU?"""
        input, weight, bias = self.product_leaves(PRODUCTS[-1], dtype)
        input[3, 5] = float("nan")
        output = torch._addmm_activation(bias, input, weight.t())
        row = output[3]
        return f"of {len(row)} NaN it lets {row.isnan().sum().item()} pass"

    def tf32(self, shape: tuple[int, int, int]) -> str:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return self.product(shape, torch.float32, TF32_TOLERANCE)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    def rows(self, call: tuple, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        ours, stock, options, makes_target = call
        logits = 3 * self.normal(*shape, dtype=dtype)
        target = makes_target(self, shape, dtype)
        if "weight" in options:
            weight = self.normal(shape[1], dtype=dtype).abs()
            options = options | {"weight": weight}

        def exact(_value: Tensor, logits: Tensor) -> Tensor:
            return stock(logits, *map(_double, target), **_map(_double, options))

        return self.against_float64(
            lambda logits: ours(logits, *target, **options),
            exact,
            [logits],
            dtype,
            TOLERANCES[dtype],
        )

    def head(self, shape: tuple[int, int, int], options: dict, dtype: torch.dtype) -> str:
        rows, features, classes = shape
        leaves = [
            self.normal(rows, features, dtype=dtype),
            self.normal(classes, features, dtype=dtype) / features**0.5,
        ]
        (target,) = self.targets((rows, classes), dtype)
        # Nothing of an ignored row is looked at.
        leaves[0][target == -100] = float("nan")

        def exact(_value: Tensor, input: Tensor, weight: Tensor) -> Tensor:
            ignored = (target == -100).unsqueeze(1)
            logits = F.linear(input.masked_fill(ignored, 0), weight)
            if cap := options.get("softcap"):
                logits = cap * torch.tanh(logits / cap)
            plain = {key: value for key, value in options.items() if key != "softcap"}
            return F.cross_entropy(logits, target, **plain)

        def ours(input: Tensor, weight: Tensor) -> Tensor:
            return functional.linear_cross_entropy(input, weight, target, **options)

        return self.against_float64(ours, exact, leaves, dtype, TOLERANCES[dtype])

    def targets(self, shape: tuple[int, ...], _dtype: torch.dtype) -> tuple[Tensor]:
        rows = (shape[0], *shape[2:])
        target = torch.randint(
            shape[1], rows, generator=self.generator, device=self.device, dtype=torch.int64
        )
        target.view(-1)[1::7] = -100
        return (target,)

    def probabilities(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor]:
        return (self.normal(*shape, dtype=torch.float32).softmax(1).to(dtype),)

    def against_float64(
        self,
        ours: Callable[..., Tensor],
        exact: Callable[..., Tensor],
        inputs: list[Tensor],
        dtype: torch.dtype,
        tolerance: float,
    ) -> str:
        """The errors of value and gradients, checked. ``exact`` gets our value, then the inputs."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        exact_leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
        value = ours(*leaves)
        exact_value = exact(value.detach(), *exact_leaves)
        # A mean's gradients are small: without scaling, float16 would hold few of their bits.
        scale = inputs[0].numel() / inputs[0].shape[1] if value.dim() == 0 else 1.0
        incoming = (1 + self.normal(*value.shape, dtype=torch.float32).abs()).mul(scale).to(dtype)
        results = [value, *torch.autograd.grad(value, leaves, incoming)]
        expected = [
            exact_value,
            *torch.autograd.grad(exact_value, exact_leaves, incoming.double()),
        ]
        errors = [_error(got, want) for got, want in zip(results, expected, strict=True)]
        text = " ".join(f"{error:.1e}" for error in errors)
        assert all(error <= tolerance for error in errors), text
        return text

    def sgd(self, options: dict, dtype: torch.dtype) -> str:
        sizes = [1, 3, 10, 1000, 100_003, *[17] * 150]
        values = [self.normal(size, dtype=dtype) for size in sizes]
        grads = [self.normal(size, dtype=dtype) for size in sizes]
        params = [torch.nn.Parameter(value.clone()) for value in values]
        exact = [torch.nn.Parameter(value.double()) for value in values]
        optimizer = fastnn.optim.SGD(params, lr=0.1, **options)
        stock = torch.optim.SGD(exact, lr=0.1, foreach=False, **options)
        for _ in range(3):
            for param, twin, grad in zip(params, exact, grads, strict=True):
                param.grad, twin.grad = grad.clone(), grad.double()
            optimizer.step()
            stock.step()
        # The error over all parameters: in one with a single element the terms may cancel.
        error = _error(*(torch.cat([one.detach() for one in list]) for list in (params, exact)))
        assert error <= TOLERANCES[dtype], f"{error:.1e}"
        return f"{error:.1e}"

    def train_step(self, options: dict, dtype: torch.dtype) -> str:
        """Compares it with the loop, through two learning rates and batches of another size."""
        model = torch.nn.Sequential(
            fastnn.nn.LinearReLU(65, 31), torch.nn.BatchNorm1d(31), torch.nn.Linear(31, 10)
        ).to(self.device, dtype)
        models = [model, copy.deepcopy(model)]
        ours, theirs = (fastnn.optim.SGD(one.parameters(), lr=0.01, **options) for one in models)
        schedulers = [torch.optim.lr_scheduler.StepLR(one, 8) for one in (ours, theirs)]
        step = fastnn.train_step(models[0], functional.cross_entropy, ours, clip_grad_norm=1.0)
        losses: list[list[Tensor]] = [[], []]
        for index in range(16):
            rows = 17 if index % 8 == 7 else 64
            input = self.normal(rows, 65, dtype=dtype)
            (target,) = self.targets((rows, 10), dtype)
            losses[0].append(step(input, target))
            loss = functional.cross_entropy(models[1](input), target)
            theirs.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
            theirs.step()
            losses[1].append(loss.detach())
            for scheduler in schedulers:
                scheduler.step()
        way = step.report().way
        assert self.device == "cpu" or way == "CUDA graph", step.report()
        flat = [torch.cat([p.detach().flatten() for p in one.parameters()]) for one in models]
        pairs = (flat, map(torch.stack, losses))
        error = max(_error(*pair) for pair in pairs)
        # Both round alike, except that the library may choose another product in a graph.
        assert error <= 16 * TOLERANCES[dtype], f"{error:.1e}"
        return f"{error:.1e} by the {way} way"


def _no_target(*_: object) -> tuple[()]:
    return ()


# Ours, torch's, the options, and the function that makes the target.
CALLS = {
    "log_softmax": (functional.log_softmax, F.log_softmax, {"dim": 1}, _no_target),
    "nll_loss": (functional.nll_loss, F.nll_loss, {"weight": None}, Smoke.targets),
    "cross_entropy": (functional.cross_entropy, F.cross_entropy, {}, Smoke.targets),
    "cross_entropy none": (
        functional.cross_entropy,
        F.cross_entropy,
        {"reduction": "none", "weight": None},
        Smoke.targets,
    ),
    "cross_entropy smoothing": (
        functional.cross_entropy,
        F.cross_entropy,
        {"label_smoothing": 0.1},
        Smoke.targets,
    ),
    "cross_entropy probabilities": (
        functional.cross_entropy,
        F.cross_entropy,
        {},
        Smoke.probabilities,
    ),
}


def _double(value: object) -> object:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_real else value


def _map(function: Callable[[object], object], options: dict) -> dict:
    return {name: function(value) for name, value in options.items()}


def _error(result: Tensor, exact: Tensor) -> float:
    difference = (result.detach().double() - exact.detach()).norm()
    return (difference / exact.detach().norm().clamp_min(1e-30)).item()


def main() -> int:
    parser = argparse.ArgumentParser(description="Check every operator on the device.")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal")
    device = parser.parse_args().device
    check_kernels(device)
    smoke = Smoke(device)
    smoke.run()
    print(f"{smoke.failures} checks failed" if smoke.failures else "every check passed")
    return 1 if smoke.failures else 0


if __name__ == "__main__":
    sys.exit(main())
