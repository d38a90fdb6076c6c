"""For all tests: a seed that failures print, the implementation under test, and the device."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

# Set before torch starts its OpenMP threads, so that idle ones sleep. Spinning, they occupy the
# core that another thread needs if there are no more cores than threads or the machine is busy; the
# suite then takes ten times as long. Results don't change.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Runs before anything imports fastnn: it may build and load the extension that replaces fastnn's.
from cuda_emulation.chosen import EMULATES_CUDA, EXECUTES_PTX

# isort: split

import pytest
import torch

import fastnn
from support import capabilities
from support.marks import BUILT_FOR_CUDA
from support.operators import FUNCTIONS
from support.sample_inputs import SEED

# For xdist's workers, which import this too.
os.environ["FASTNN_TEST_SEED"] = str(SEED)


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
        # By default the library may round parts of a sum to the narrow dtype before it adds them
        # up: such errors have no bound tight enough to test our kernels.
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
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "reference" in callspec.params.get("implementation", ""):
            return "the reference, which has no kernels"
    if item.get_closest_marker("needs_gpu") and not (torch.cuda.is_available() and BUILT_FOR_CUDA):
        return "needs a GPU, and the extension built for it"
    return None


left_out: Counter[str] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device, large = config.getoption("device"), config.getoption("large")
    # xdist compares the workers' lists of tests, and addresses differ between processes.
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


# Number of PyTorch's own test inputs that agree, by operator; printed at the end of the run.
AGREEMENT = pytest.StashKey[Counter]()


@pytest.fixture
def record_agreement(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts the torch inputs on which fastnn agrees."""
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
    """Seeds torch's own generator, too, for tests that draw from it."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--device cuda``, tensors created without a device are on the GPU.

    ``torch.get_default_device()`` is the device under test, for tests that need its name.
    """
    device = request.config.getoption("device")
    with torch.device(device) if device != "cpu" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _ends_with_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the process after a failed kernel: it can't use the GPU any more.

    Under xdist another worker takes its place, and only this test is reported as failed.
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
    """Restores the number of threads after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Starts without another test's compiled code, and leaves none behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Implementations of fastnn.functional's functions: themselves, the plain PyTorch that they fall
# back to, and the Functions of fastnn.autograd, over the extension or over plain PyTorch.
IMPLEMENTATIONS = ("functional", "reference", "autograd", "autograd over reference")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replaces the functions by one of the implementations.

    Without the extension all of them run plain PyTorch (and test_dispatch.py fails).
    """
    if request.param == "reference":
        monkeypatch.setattr(fastnn.functional, "operators", lambda: fastnn.reference)
    if request.param.startswith("autograd"):
        for name, function in FUNCTIONS.items():
            monkeypatch.setattr(fastnn.functional, name, function.apply)
    if request.param == "autograd over reference":
        monkeypatch.setattr(fastnn._function, "extension", None)
    return request.param
