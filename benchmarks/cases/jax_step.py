"""JAX as a contender: its process is asked for samples, so it takes turns like the others."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import Contender, Inputs, Unavailable
from benchmarks.device import CPU, Timer
from benchmarks.timing import Sampler


@dataclass
class JaxStep(Contender):
    """The MLP's training step, jitted as a whole."""

    weights: Callable[[], list[Tensor]]
    lr: float
    momentum: float
    checked_steps: int

    def __post_init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def check(self, inputs: Inputs) -> list[Tensor]:
        """The losses, which depend on the weights; the weights' layout is internal to JAX."""
        self._start()
        self._send(inputs)
        return [torch.tensor(loss) for loss in self._ask("losses", self.checked_steps)]

    def sampler(self, inputs: Inputs, timer: Timer = CPU.time_calls) -> Sampler:
        self._send(inputs)
        return lambda count: self._ask("time", count)

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def _start(self) -> None:
        if importlib.util.find_spec("jax") is None:
            raise Unavailable("jax is not installed")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.jax_server", str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        weights = [weight.numpy() for weight in self.weights()]
        self._ask("build", weights, self.lr, self.momentum)

    def _send(self, inputs: Inputs) -> None:
        self._ask("batch", *(arg.numpy() for arg in inputs.args))

    def _ask(self, *request: object) -> object:
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            raise RuntimeError("jax's process has ended") from None
