"""A training step in one call of the extension."""

from __future__ import annotations

from torch import Tensor

from fastnn._step import Batch, Program


class FusedStep:
    """The whole step in C++; see :class:`fastnn._step.Way`."""

    name = "fused"

    def why_not(self, program: Program) -> str:
        """Why no call can be fused."""
        return "this version of fastnn fuses no whole step"

    def why_not_batch(self, program: Program, batch: Batch) -> str:
        """Why this batch can't."""
        return ""

    def run(self, program: Program, batch: Batch) -> Tensor:
        """Runs a call."""
        raise NotImplementedError
