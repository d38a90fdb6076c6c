"""What ten minutes of a GPU can tell about fastnn, in one command.

    python tools/gpu/check.py [--out DIR] [--seconds 540] [--only build,smoke]

It uses the environment that it is started in, sets nothing up and needs no network. Every step is a
process with its own time limit, and its result is saved before the next begins: neither a failure
nor a timeout loses earlier results. In DIR (build/gpu_check):

    summary.json    for each step: how it ended, how long it took, the end of its output
    log.txt         the output of all steps
    junit.xml       the result of each of the operators' tests
    sanitizer.txt   what compute-sanitizer found
    bench.json      the benchmark; bench.txt: the same as tables
    ncu.csv         what Nsight Compute measured of our kernels

The exit status is 0 if every step that ran has passed, 1 if one has not, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from steps import REPOSITORY, Step, steps

sys.path.insert(0, str(REPOSITORY))  # the benchmarks are not installed with the package

from benchmarks.arguments import seconds

#: A step isn't started with less time left.
LEAST_SECONDS = 15
#: How long a step that has reached its limit may take to write what it has.
GRACE_SECONDS = 8
#: How long a step's done_if may take.
DONE_IF_SECONDS = 60
MOST_NAMES = 40  # of failed tests that are printed
TAIL = 800  # characters of a step's output in the summary


@dataclass
class Result:
    """How a step ended."""

    step: str
    status: str  # passed, failed, out of time, interrupted, not run
    seconds: float = 0.0
    returncode: int | None = None
    tests: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    tail: str = ""


class Check:
    """Runs steps within a time, phase by phase; those of a phase run side by side.

    Args:
        out: the folder of results. Results of an earlier run that these steps write are deleted.
        seconds: how long all of it may take.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.results: list[Result] = []
        self.told_to_end = False
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "log.txt"
        self.log.write_bytes(b"")

    def run(self, chosen: Sequence[Step]) -> list[Result]:
        for name in {"summary.json"}.union(*(step.files for step in chosen)):
            (self.out / name).unlink(missing_ok=True)
        running: list[Running] = []
        for phase in sorted({step.phase for step in chosen}):
            for step in chosen:
                if self.told_to_end:
                    break
                if step.phase == phase and (process := self.start(step)) is not None:
                    running.append(process)
            while running and not self.told_to_end:
                for process in [process for process in running if process.has_ended()]:
                    running.remove(process)
                    self.finish(process)
                time.sleep(0.1)
        for process in running:
            process.interrupt()
            self.finish(process)
        return self.results

    def tell_to_end(self, *_: object) -> None:
        """Handles a signal. An exception could come before a started step is in the list of those
        that run, and would leave the step behind."""
        self.told_to_end = True

    def finish(self, process: Running) -> None:
        self.save(process.result(self.out))
        self.keep_output(process)

    def start(self, step: Step) -> Running | None:
        limit = min(step.seconds, self.end - time.monotonic() - GRACE_SECONDS)
        if limit < min(step.seconds, LEAST_SECONDS):
            return self.leave_out(step, "not run", "no time was left")
        if step.needs and shutil.which(step.needs) is None:
            return self.leave_out(step, "not run", f"{step.needs} is not on the PATH")
        if step.done_if and succeeds(step.done_if, step.env):
            return self.leave_out(step, "passed", "it was done already")
        print(f"{step.name} ...", flush=True)
        try:
            return Running(step.within(limit), limit, self.out / f".{step.name}.log")
        except OSError as error:
            return self.leave_out(step, "failed", str(error))

    def leave_out(self, step: Step, status: str, reason: str) -> None:
        self.save(Result(step.name, status, tail=reason))

    def save(self, result: Result) -> None:
        """Saves at once and atomically: a reader never finds half a file."""
        self.results.append(result)
        print(line(result), flush=True)
        temporary = self.out / ".summary.json"
        document = [asdict(one) for one in self.results]
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(self.out / "summary.json")

    def keep_output(self, process: Running) -> None:
        output = process.output()
        with self.log.open("ab") as log:
            log.write(f"\n===== {process.step.name}\n".encode() + output)
        if process.step.output is not None:
            with (self.out / process.step.output).open("ab") as file:
                file.write(output)
        process.path.unlink()


class Running:
    """A step's process and its limit."""

    def __init__(self, step: Step, limit: float, path: Path) -> None:
        self.step, self.path = step, path
        self.began = time.monotonic()
        self.until, self.kill_at = self.began + limit, self.began + limit + GRACE_SECONDS
        self.stopped = self.interrupted = False
        with path.open("wb") as output:
            self.process = subprocess.Popen(
                step.command,
                cwd=REPOSITORY,
                env=environment(step.env),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, to be stopped as one
            )

    def has_ended(self) -> bool:
        """Whether the process is gone; stops it when its time is up, and kills it in the end."""
        if self.process.poll() is not None:
            self.signal(signal.SIGKILL)  # what it has left behind
            return True
        now = time.monotonic()
        if now > self.kill_at:
            self.signal(signal.SIGKILL)
            return now > self.kill_at + GRACE_SECONDS  # one stuck in a driver can't even be killed
        if now > self.until and not self.stopped:
            self.stopped = True
            self.signal(signal.SIGINT)  # pytest and ncu still write what they have
        return False

    def interrupt(self) -> None:
        """Ends the process at once, because this program has been told to end."""
        self.interrupted = True
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def output(self) -> bytes:
        return self.path.read_bytes()

    def status(self) -> str:
        if self.interrupted:
            return "interrupted"
        if self.stopped:
            return "out of time"
        return "passed" if self.process.returncode == 0 else "failed"

    def result(self, out: Path) -> Result:
        tests, failures = take_junit(out / self.step.junit) if self.step.junit else ({}, [])
        return Result(
            step=self.step.name,
            status=self.status(),
            seconds=round(time.monotonic() - self.began, 1),
            returncode=self.process.returncode,
            tests=tests,
            failures=failures,
            tail=self.output()[-TAIL:].decode(errors="replace"),
        )


def environment(variables: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | variables


def succeeds(command: Sequence[str], variables: dict[str, str]) -> bool:
    try:
        process = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment(variables),
            capture_output=True,
            check=False,
            timeout=DONE_IF_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return process.returncode == 0


def take_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """Reads a report, and deletes it if it is hidden."""
    found = read_junit(path)
    if path.name.startswith("."):
        path.unlink(missing_ok=True)
    return found


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """The number of tests by outcome, and the names of the failed ones; empty without a report."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}, []
    failed = [case for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skipped = [case for case in cases if case.find("skipped") is not None]
    counts = {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
    }
    return counts, [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def line(result: Result) -> str:
    """A result as a line of the report."""
    tests = ", ".join(f"{count} {name}" for name, count in result.tests.items() if count)
    reason = result.tail if result.returncode is None else ""
    words = [f"{result.step:12}", f"{result.status:12}", f"{result.seconds:6.1f} s", tests, reason]
    return "  ".join(word for word in words if word)


def why_no_gpu() -> str | None:
    """Why nothing can be checked here, in one sentence; None if there is a GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch can't be imported ({error}): start this where torch with CUDA is installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    return None


def parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and measure fastnn on a GPU.")
    default = REPOSITORY / "build/gpu_check"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=f"({default})")
    parser.add_argument("--seconds", type=seconds, default=540, metavar="S", help="in all (540)")
    parser.add_argument("--only", metavar="A,B", help=f"some of the steps: {', '.join(names)}")
    options = parser.parse_args(arguments)
    options.only = names if options.only is None else options.only.split(",")
    unknown = [name for name in options.only if name not in names]
    if unknown:
        parser.error(f"there is no step {unknown[0]!r}; the steps are {', '.join(names)}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    names = [step.name for step in steps(Path())]
    options = parse(arguments, names)
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu-check: {reason}.", file=sys.stderr)
        return 2
    out = options.out.resolve()
    chosen = [step for step in steps(out) if step.name in options.only]
    check = Check(out, options.seconds)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, check.tell_to_end)
    results = check.run(chosen)
    print("\n".join(["", *map(line, results)]))
    failures = [name for result in results for name in result.failures]
    print("".join(f"FAILED  {name}\n" for name in failures[:MOST_NAMES]), end="")
    if len(failures) > MOST_NAMES:
        print(f"and {len(failures) - MOST_NAMES} more, named in summary.json")
    print(f"Results: {out}")
    return int(any(result.status not in ("passed", "not run") for result in results))


if __name__ == "__main__":
    sys.exit(main())
