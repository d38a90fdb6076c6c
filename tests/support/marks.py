"""Marks used in several files: what tests need, and where they are left out."""

from __future__ import annotations

import pytest
import torch

import fastnn

# For what only the extension promises. Its absence isn't hidden: a test in test_dispatch.py fails.
needs_extension = pytest.mark.skipif(
    not fastnn.is_available(), reason="fastnn's extension isn't built; the reference runs instead"
)

# False if the CUDA kernels are emulated: they then replace the CPU's.
BUILT_FOR_CUDA = fastnn.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fastnn::log_softmax", "CUDA"
)

# torch 2.9 rejects such a gradient when it is assigned, whatever the test allows.
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"),
    reason="in this torch a gradient must have its parameter's dtype",
)

# For what requires a GPU; the report says how many were left out without one.
needs_gpu = pytest.mark.needs_gpu

# For calls with a bad class index: without this mark one test would fail all later ones.
trips_device_assert = pytest.mark.not_on_a_gpu(
    "device asserts, after which a process can't use the GPU; test_cuda.py starts one for them"
)

# For what the functions promise and the Functions don't.
of_functions = pytest.mark.parametrize("implementation", ["functional", "reference"], indirect=True)
