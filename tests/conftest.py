"""For all tests: a seed that failures print, what runs behind fastnn, and on which device."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

# Before torch starts its OpenMP threads: waiting ones then sleep. Spinning, they hold the core that
# the other thread needs where the machine has no more cores than threads, or other work to do; the
# suite then takes ten times as long. Results are the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Before anything imports fastnn: this may build and load the extension that stands in for its own.
from cuda_emulation.chosen import EMULATES_CUDA, EXECUTES_PTX

# isort: split

import pytest
import torch

import fastnn
from support import capabilities
from support.marks import BUILT_FOR_CUDA
from support.operators import FUNCTIONS
from support.sample_inputs import SEED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tests make their tensors",
    )
    parser.addoption("--large", action="store_true", help="tests of more than 2^31 elements, alone")
    parser.addoption("--capabilities", type=Path, help="file for the matrix of capabilities.py")
    parser.addoption("--never-launched", type=Path, help="file for PTX kernels no test launched")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda needs a GPU, and torch finds none")
        if not BUILT_FOR_CUDA:
            raise pytest.UsageError("--device cuda needs fastnn's CUDA part, which is not built")
        # By default the library may add up parts of a sum that it has rounded to the narrow dtype:
        # errors of that kind have no bound that would say anything of ours.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if path := config.getoption("--capabilities"):
        config.pluginmanager.register(capabilities.Recorder(path))


def pytest_report_header() -> list[str]:
    built = "" if fastnn.is_available() else "not "
    kernels = f"extension {built}built"
    if EMULATES_CUDA:
        kernels = f"CUDA kernels{' in PTX' * EXECUTES_PTX} emulated on the CPU"
    return [f"fastnn: FASTNN_TEST_SEED={SEED}, {kernels}"]


def reason_to_leave_out(item: pytest.Item, device: str, large: bool) -> str | None:
    if large != (item.get_closest_marker("large") is not None):
        return "not of --large" if large else "of more than 2^31 elements; make test-large"
    if device == "cuda" and (marker := item.get_closest_marker("not_on_a_gpu")):
        return marker.args[0]
    on_cuda_kernels = EMULATES_CUDA or device == "cuda"
    if not on_cuda_kernels and item.get_closest_marker("on_cuda_kernels"):
        return "of the CUDA kernels, emulated or not"
    if on_cuda_kernels:
        if marker := item.get_closest_marker("cpu_only"):
            return marker.args[0]
        if re.search("linear_cross_entropy|LinearCrossEntropy", item.nodeid):
            return "linear_cross_entropy, whose kernels are the CPU's"
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "reference" in callspec.params.get("implementation", ""):
            return "the reference, which has no kernels"
    if item.get_closest_marker("needs_gpu") and not (torch.cuda.is_available() and BUILT_FOR_CUDA):
        return "needs a GPU, and the extension built for it"
    return None


left_out: Counter[str] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device, large = config.getoption("device"), config.getoption("large")
    # xdist compares the workers' lists of tests, and addresses differ from process to process.
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"a test is named after an address: {named[0]}")
    reasons = {item: reason_to_leave_out(item, device, large) for item in items}
    left_out.update(reason for reason in reasons.values() if reason is not None)
    config.hook.pytest_deselected(items=[item for item in items if reasons[item] is not None])
    items[:] = [item for item in items if reasons[item] is None]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    if report.failed:
        report.sections.append(("seed", f"rerun with FASTNN_TEST_SEED={SEED}"))


# How many of PyTorch's own test inputs agree, by operator; printed when the run ends.
AGREEMENT = pytest.StashKey[Counter]()


@pytest.fixture
def record_agreement(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts one of torch's inputs on which fastnn agreed."""
    counter = request.config.stash.setdefault(AGREEMENT, Counter())

    def record(name: str) -> None:
        counter[name] += 1

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, count in sorted(left_out.items()):
        terminalreporter.write_line(f"left out: {count} tests ({reason})")
    if EXECUTES_PTX:
        emulation = torch.ops.fastnn_cuda_emulation
        never, count = emulation.ptx_never_launched(), emulation.ptx_kernel_count()
        terminalreporter.write_line(f"PTX executed: {count - len(never)} of {count} kernels")
        if path := terminalreporter.config.getoption("--never-launched"):
            path.write_text("".join(f"{name}\n" for name in never))
    counter = terminalreporter.config.stash.get(AGREEMENT, Counter())
    if counter:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))
        terminalreporter.write_line(f"PyTorch's own test inputs on which fastnn agrees: {counts}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Whatever a test draws from torch's own generator comes from the seed too."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--device cuda``, what a test makes without naming a device lies on the GPU.

    ``torch.get_default_device()`` is the device under test, for those that need its name.
    """
    device = request.config.getoption("device")
    with torch.device(device) if device != "cpu" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _ends_with_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a failed kernel this process can't use the GPU, and every later test would fail too.

    Under xdist the worker ends: another takes its place, and this test alone is reported.
    """
    yield
    if request.config.getoption("device") != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = f"{request.node.nodeid} left the GPU unusable: {error}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            print(reason, file=sys.__stderr__, flush=True)
            os._exit(3)
        pytest.exit(reason, returncode=3)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Puts back the number of threads that a test changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code of another test's, and none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# What the functions of fastnn.functional are: those, the same over the plain PyTorch that they fall
# back to, or the Functions of fastnn.autograd, over the extension or over plain PyTorch.
IMPLEMENTATIONS = ("functional", "reference", "autograd", "autograd over reference")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts one of those in the place of the functions.

    Where the extension isn't built all are over plain PyTorch (test_dispatch.py fails then).
    """
    if request.param == "reference":
        monkeypatch.setattr(fastnn.functional, "operators", lambda: fastnn.reference)
    if request.param.startswith("autograd"):
        for name, function in FUNCTIONS.items():
            monkeypatch.setattr(fastnn.functional, name, function.apply)
    if request.param == "autograd over reference":
        monkeypatch.setattr(fastnn._function, "extension", None)
    return request.param
