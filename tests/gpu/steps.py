"""The steps of check.py: what each runs, how long it may take, and beside which others."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
# What is compiled in one step is found by the next.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": str(REPOSITORY / "build/inductor"),
    "TRITON_CACHE_DIR": str(REPOSITORY / "build/triton"),
}


@dataclass(frozen=True)
class Step:
    """A command.

    Args:
        name: what ``--only`` and the results call it.
        command: the program and its arguments.
        seconds: how long it may take.
        phase: those of one phase run side by side; where times are measured, nothing else runs.
        env: variables beside those of this process.
        needs: a program without which the step is not run.
        done_if: a command that succeeds where the step need not run.
        junit: the name of the report of tests that it writes, if it does. One whose name begins
            with a point goes when it has been read.
    """

    name: str
    command: list[str]
    seconds: float
    phase: int
    env: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    done_if: list[str] | None = None
    junit: str | None = None


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "operators", "cuda_plans", "gradients", "accuracy", "optim", "training", "errors",
        "autocast", "nn", "dispatch", "transforms", "compile", "saving", "torch_inputs", "fusion",
    )
    # torch's own test inputs need a package that few have.
    if name != "torch_inputs" or has("expecttest")
]  # fmt: skip

# All that ncu is asked for of each kernel.
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
    "team_rows", "subwarp_rows", "split_reduce", "split_finish", "strided_rows", "finish_loss",
    "nll_loss_rows", "sum_class_weights", "relu_backward_kernel", "column_sums_kernel",
    "gemm_kernel", "sgd_step_kernel",
]  # fmt: skip


def steps(out: Path) -> list[Step]:
    """All steps, for a folder of results."""
    return [*prepare(), *correct(out), *measured(out), *large(out)]


def prepare() -> Iterator[Step]:
    """What the machine is; the extension, for its GPU alone."""
    facts = f"nvidia-smi; nvcc --version; c++ --version; {PYTHON} -m torch.utils.collect_env"
    yield Step("facts", shell(facts), 30, 0)
    yield Step(
        "build",
        shell(
            f"export TORCH_CUDA_ARCH_LIST=$({PYTHON} -c {shlex.quote(CAPABILITY)}); "
            f"{PYTHON} setup.py build_ext --inplace"
        ),
        240,
        0,
        env={"FASTNN_CUDA": "1"},
        done_if=[PYTHON, "-W", "error", "-c", HAS_CUDA_KERNELS],
    )
    yield Step("smoke", [PYTHON, "tests/gpu/smoke.py"], 60, 1)
    yield Step("ceilings", [PYTHON, "tests/gpu/ceilings.py"], 40, 2)


def correct(out: Path) -> Iterator[Step]:
    """The tests, and compute-sanitizer's tools; the benchmark's peers are compiled meanwhile."""
    # A seed for all: each worker collects the tests by itself, and their names must agree.
    env = {"FASTNN_TEST_SEED": "20250101", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    junit = "junit.xml"
    count = str(max(2, (os.cpu_count() or 1) - 4))  # four are the sanitizer's
    workers = ["-n", count, "--dist", "worksteal", "--max-worker-restart", "40"]
    command = [*pytest(out / junit), *(workers if has("xdist") else [])]
    if has("pytest_timeout"):
        command += ["--timeout", "90"]
    yield Step("tests", [*command, *TESTS], 180, 3, env=env, junit=junit)
    junit = ".junit-cuda.xml"
    command = [*pytest(out / junit), "tests/test_cuda.py"]
    yield Step("graphs", command, 90, 3, env=env, junit=junit)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        yield sanitizer(tool, out / "sanitizer.txt")
    warm = [PYTHON, "-m", "benchmarks", "--device", "cuda", "--warm", "--limit", "145"]
    yield Step("warm", warm, 150, 3, env=CACHES)


def pytest(junit: Path) -> list[str]:
    options = ["-p", "no:cacheprovider", "--device", "cuda", "-q", "--tb=short"]
    options += ["--continue-on-collection-errors", f"--junitxml={junit}"]
    return [PYTHON, "-m", "pytest", *options]


def sanitizer(tool: str, report: Path) -> Step:
    """One of compute-sanitizer's tools over our kernels."""
    sanitizer, launches = ["compute-sanitizer", "--tool", tool], [PYTHON, "tests/gpu/launches.py"]
    sanitizer += ["--error-exitcode", "9", "--print-limit", "20"]
    if tool in ("racecheck", "initcheck"):
        sanitizer += ["--kernel-name", "kns=fastnn"]
        launches += ["--no-library"]
    command = f"{shlex.join([*sanitizer, *launches])} 2>&1 | tee -a {shlex.quote(str(report))}"
    # Without the caching, or an overflow stays inside of torch's pool of memory.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, shell(command), 120, 3, env=env, needs="compute-sanitizer")


def measured(out: Path) -> Iterator[Step]:
    """Alone on the GPU, each."""
    bench = f"{PYTHON} -m benchmarks --device cuda --limit 160 --json {out}/bench.json"
    yield Step("bench", shell(f"{bench} | tee {out}/bench.txt"), 180, 4, env=CACHES)
    kernels = f"regex:^({'|'.join(KERNELS)})$"
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "-k", kernels]
    command += ["--metrics", ",".join(METRICS), "--csv", "--log-file", f"{out}/ncu.csv"]
    command += [PYTHON, "-m", "benchmarks.once", "--device", "cuda"]
    yield Step("ncu", command, 80, 5, needs="ncu")


def large(out: Path) -> Iterator[Step]:
    junit = ".junit-large.xml"
    command = [*pytest(out / junit), "--large", "-x", "tests/test_large.py"]
    yield Step("large", command, 120, 6, junit=junit)


CAPABILITY = "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))"
HAS_CUDA_KERNELS = (
    "import torch, fastnn;"
    "fastnn.functional.log_softmax(torch.zeros(2, 3, device='cuda'), 1).cpu();"
    "assert fastnn._extension.build_info()['cuda']"
)


def shell(command: str) -> list[str]:
    return ["bash", "-o", "pipefail", "-c", command]
