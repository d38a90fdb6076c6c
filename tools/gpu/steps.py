"""The steps of check.py: what each runs, how long it may take, and which others run beside it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
TO_SPARE = 15  # seconds
# One step finds what another has compiled.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": str(REPOSITORY / "build/inductor"),
    "TRITON_CACHE_DIR": str(REPOSITORY / "build/triton"),
}


@dataclass(frozen=True)
class Step:
    """A command.

    Args:
        name: its name for ``--only`` and in the results.
        command: the program and its arguments; "{seconds}" stands for the time it has.
        seconds: how long it may take.
        phase: steps of one phase run side by side; a step that measures times runs alone.
        env: variables besides those of this process.
        needs: a program without which the step isn't run.
        done_if: a command that succeeds if the step need not run.
        junit: the name of the test report that it writes, if any. One whose name begins with a dot
            is deleted once it has been read.
        writes: the names of other results that it writes.
        output: the name of the file that keeps its output, besides the log.
    """

    name: str
    command: list[str]
    seconds: float
    phase: int
    env: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    done_if: list[str] | None = None
    junit: str | None = None
    writes: tuple[str, ...] = ()
    output: str | None = None

    @property
    def files(self) -> set[str]:
        """The names of its results."""
        return {*self.writes, *filter(None, (self.junit, self.output))}

    def within(self, limit: float) -> Step:
        """The step with its time limit, less some seconds to spare, in its command."""
        told = str(max(1, int(limit) - TO_SPARE))
        return replace(self, command=[word.replace("{seconds}", told) for word in self.command])


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


TESTS = [
    f"tests/{path}"
    for path in (
        "ops/test_operators.py", "ops/test_gradients.py", "ops/test_accuracy.py",
        "ops/test_errors.py", "ops/test_backward_errors.py", "ops/test_autocast.py",
        "ops/test_dispatch.py", "ops/test_opcheck.py", "ops/test_tensor_classes.py",
        "ops/test_torch_inputs.py", "nn", "optim", "transforms/test_transforms.py",
        "transforms/test_compile.py", "programs/test_training.py", "programs/test_saving.py",
        "cuda/test_cuda_plans.py",
    )
    # torch's own test inputs need a package that few have.
    if path != "ops/test_torch_inputs.py" or has("expecttest")
]  # fmt: skip

# What ncu measures of each kernel.
METRICS = [
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__waves_per_multiprocessor",
    "smsp__inst_executed_op_local_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
]
KERNELS = [
    "team_rows_kernel", "subwarp_rows_kernel", "split_reduce_kernel", "split_finish_kernel",
    "strided_rows_kernel", "finish_loss_kernel", "nll_loss_kernel", "sum_class_weights_kernel",
    "sum_target_weights_kernel", "relu_backward_kernel", "column_sums_kernel", "gemm_kernel",
    "sgd_step_kernel",
]  # fmt: skip


def steps(out: Path) -> list[Step]:
    """All steps, for a folder of results."""
    return [*prepare(), *correct(out), *measured(out), *large(out)]


def prepare() -> Iterator[Step]:
    """Describes the machine, and builds the extension for its GPU only."""
    python = shlex.quote(PYTHON)
    facts = f"nvidia-smi; nvcc --version; c++ --version; {python} -m torch.utils.collect_env"
    yield Step("facts", shell(facts), 30, 0)
    yield Step(
        "build",
        shell(
            f"export TORCH_CUDA_ARCH_LIST=$({python} -c {shlex.quote(CAPABILITY)}); "
            f"{python} setup.py build_ext --inplace"
        ),
        240,
        0,
        env={"FASTNN_CUDA": "1"},
        done_if=[PYTHON, "-W", "error", "-c", IS_BUILT],
    )
    yield Step("smoke", [PYTHON, "tools/gpu/smoke.py"], 60, 1)
    yield Step("ceilings", [PYTHON, "tools/gpu/ceilings.py"], 40, 2)


def correct(out: Path) -> Iterator[Step]:
    """The tests, and compute-sanitizer's tools; the benchmark's peers are compiled meanwhile."""
    # One seed for all: each worker collects the tests by itself, and their names must agree.
    env = {"FASTNN_TEST_SEED": "20250101", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    junit = "junit.xml"
    count = str(max(2, (os.cpu_count() or 1) - 4))  # four are the sanitizer's
    workers = ["-n", count, "--dist", "worksteal", "--max-worker-restart", "40"]
    command = [*pytest(out / junit), *(workers if has("xdist") else [])]
    if has("pytest_timeout"):
        command += ["--timeout", "90"]
    yield Step("tests", [*command, *TESTS], 180, 3, env=env, junit=junit)
    junit = ".junit-cuda.xml"
    command = [*pytest(out / junit), "tests/cuda/test_cuda.py"]
    yield Step("graphs", command, 90, 3, env=env, junit=junit)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        yield sanitizer(tool)
    warm = [PYTHON, "-m", "benchmarks", "--device", "cuda", "--warm", "--limit", "{seconds}"]
    yield Step("warm", warm, 150, 3, env=CACHES)


def pytest(junit: Path) -> list[str]:
    options = ["-p", "no:cacheprovider", "--device", "cuda", "-q", "--tb=short"]
    options += ["--continue-on-collection-errors", f"--junitxml={junit}"]
    return [PYTHON, "-m", "pytest", *options]


def sanitizer(tool: str) -> Step:
    """One of compute-sanitizer's tools over our kernels."""
    sanitizer, launches = ["compute-sanitizer", "--tool", tool], [PYTHON, "tools/gpu/launches.py"]
    sanitizer += ["--error-exitcode", "9", "--print-limit", "20"]
    if tool in ("racecheck", "initcheck"):
        sanitizer += ["--kernel-name", "kns=fastnn"]
        launches += ["--no-library"]
    return Step(
        tool,
        [*sanitizer, *launches],
        120,
        3,
        # With caching, an overflow would stay inside torch's memory pool.
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        needs="compute-sanitizer",
        output="sanitizer.txt",
    )


def measured(out: Path) -> Iterator[Step]:
    """The steps that run alone on the GPU."""
    bench = [PYTHON, "-m", "benchmarks", "--device", "cuda", "--limit", "{seconds}"]
    bench += ["--json", f"{out}/bench.json"]
    yield Step("bench", bench, 185, 4, env=CACHES, writes=("bench.json",), output="bench.txt")
    kernels = f"regex:^({'|'.join(KERNELS)})$"
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "-k", kernels]
    command += ["--metrics", ",".join(METRICS), "--csv", "--log-file", f"{out}/ncu.csv"]
    command += [PYTHON, "-m", "benchmarks.once", "--device", "cuda"]
    yield Step("ncu", command, 80, 5, needs="ncu", writes=("ncu.csv",))


def large(out: Path) -> Iterator[Step]:
    junit = ".junit-large.xml"
    command = [*pytest(out / junit), "--large", "-x", "tests/ops/test_large.py"]
    yield Step("large", command, 120, 6, junit=junit)


CAPABILITY = "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))"
# Succeeds if the extension is built for this GPU and from the current sources.
IS_BUILT = """
import torch, fastnn
from pathlib import Path
fastnn.functional.log_softmax(torch.zeros(2, 3, device="cuda"), 1).cpu()
assert fastnn._extension.build_info()["cuda"]
built = Path(fastnn._extension.extension.__file__).stat().st_mtime
assert all(path.stat().st_mtime <= built for path in Path("csrc").rglob("*.*"))
"""


def shell(command: str) -> list[str]:
    return ["bash", "-o", "pipefail", "-c", command]
