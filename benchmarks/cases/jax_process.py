"""JAX as a contender: its process is asked for each sample, so it takes turns like the others."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.case import Contender, Inputs, Unavailable
from benchmarks.device import CPU, Timer
from benchmarks.machine import instruction_set_limit
from benchmarks.timing import Sampler

# With --xla_cpu_max_isa=AVX2 its products still run above the peak rate of AVX2.
UNLIMITED = "its products can't be limited to an instruction set"


class JaxProcess(Contender):
    """A function that JAX compiles and runs in its own process."""

    process: subprocess.Popen[bytes] | None = None

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        raise Unavailable("its memory belongs to another process")

    def sampler(self, inputs: Inputs, timer: Timer = CPU.time_calls) -> Sampler:
        self._send(inputs)
        return lambda count: self._ask("time", count)

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def _start(self, program: str, *arguments: object) -> None:
        """Starts the program, a class of :mod:`benchmarks.jax_server`."""
        if importlib.util.find_spec("jax") is None:
            raise Unavailable("jax is not installed")
        if instruction_set_limit():
            raise Unavailable(UNLIMITED)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.jax_server", str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        self._ask("build", program, *arguments)

    def _send(self, inputs: Inputs) -> None:
        self._ask("batch", *(arg.detach().numpy() for arg in inputs.args))

    def _ask(self, *request: object) -> Any:
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            raise RuntimeError("the JAX process has exited") from None
