"""Marks of tests in several files: what they need, and where they are left out."""

from __future__ import annotations

import pytest
import torch

import fastnn

# For what the extension alone promises. Nothing is hidden where it is missing: a test of
# test_dispatch.py fails then.
needs_extension = pytest.mark.skipif(
    not fastnn.is_available(), reason="fastnn's extension isn't built; the reference runs instead"
)

# Not so where the CUDA kernels are emulated: they then stand in for the CPU's.
BUILT_FOR_CUDA = fastnn.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fastnn::log_softmax", "CUDA"
)

# torch 2.9 refuses the gradient as it is assigned, whatever a test says that it may be.
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"),
    reason="in this torch a gradient is of its parameter's dtype",
)

# For what takes a GPU; the report says how many were left out without one.
needs_gpu = pytest.mark.needs_gpu

# For calls with a bad class index: without this one test would fail all that come after it.
trips_device_assert = pytest.mark.not_on_a_gpu(
    "device asserts, after which a process can't use the GPU; test_cuda.py starts one for them"
)

# For what is promised of the functions, and of no Function.
of_functions = pytest.mark.parametrize("implementation", ["functional", "reference"], indirect=True)
