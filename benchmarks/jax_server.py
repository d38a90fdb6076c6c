"""What JAX jits, in a process without torch: an MLP's step, and a head of many classes.

Reads pickled requests from stdin and answers on stdout: ``("build", "Mlp", weights, lr, momentum)``
or ``("build", "Head", gradients)``, then what the methods of these classes take, by their names:
``("time", calls)`` gives seconds. The argument is the number of threads.
"""

from __future__ import annotations

import os
import pickle
import sys
import time


def limit_threads(threads: int) -> None:
    """Limits XLA's threads, as many as the processors it may use; call it before importing jax."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class Mlp:
    """The state of the training, and its jitted step."""

    def __init__(self, weights: list, lr: float, momentum: float) -> None:
        import jax
        import jax.numpy as jnp

        self.asarray = jnp.asarray
        self.params = [jnp.asarray(weight) for weight in weights]
        self.buffers = [jnp.zeros_like(param) for param in self.params]

        def loss_of(params, images, labels):
            for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
                images = jax.nn.relu(images @ weight.T + bias)
            log_probs = jax.nn.log_softmax(images @ params[-2].T + params[-1])
            return -jnp.take_along_axis(log_probs, labels[:, None], axis=1).mean()

        def step(params, buffers, images, labels):
            loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
            # With zero buffers the first step's momentum is the gradient, as in torch.
            buffers = [momentum * old + grad for old, grad in zip(buffers, grads, strict=True)]
            params = [old - lr * buffer for old, buffer in zip(params, buffers, strict=True)]
            return params, buffers, loss

        # Donated: the new parameters reuse the memory of the old ones, like an in-place update.
        self.jitted = jax.jit(step, donate_argnums=(0, 1))

    def batch(self, images, labels) -> None:
        """Sets the batch for the following steps."""
        self.images, self.labels = self.asarray(images), self.asarray(labels)

    def step(self):
        """Runs one step; returns its loss, which may not be computed yet."""
        self.params, self.buffers, loss = self.jitted(
            self.params, self.buffers, self.images, self.labels
        )
        return loss

    def losses(self, steps: int) -> list[float]:
        return [float(self.step()) for _ in range(steps)]

    def time(self, steps: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(steps):
            loss = self.step()
        loss.block_until_ready()
        return (time.perf_counter_ns() - start) * 1e-9


class Head:
    """A linear layer and its cross entropy, and the gradients of both factors if wanted."""

    def __init__(self, gradients: bool) -> None:
        import jax
        import jax.numpy as jnp

        self.asarray = jnp.asarray
        self.wait = jax.block_until_ready

        def loss_of(hidden, weight, target):
            log_probs = jax.nn.log_softmax(hidden @ weight.T)
            return -jnp.take_along_axis(log_probs, target[:, None], axis=1).mean()

        self.jitted = jax.jit(jax.value_and_grad(loss_of, (0, 1)) if gradients else loss_of)

    def batch(self, *arguments) -> None:
        self.arguments = [self.asarray(argument) for argument in arguments]

    def results(self) -> list:
        """The loss, and the gradients if they are wanted."""
        import jax
        import numpy as np

        return [np.array(result) for result in jax.tree.leaves(self.jitted(*self.arguments))]

    def time(self, calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            self.wait(self.jitted(*self.arguments))
        return (time.perf_counter_ns() - start) * 1e-9


PROGRAMS = {"Mlp": Mlp, "Head": Head}


def main(threads: int) -> None:
    """Answers requests until stdin ends."""
    limit_threads(threads)
    program = None
    while True:
        try:
            request, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if request == "build":
            name, *rest = arguments
            program, answer = PROGRAMS[name](*rest), None
        else:
            answer = getattr(program, request)(*arguments)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
