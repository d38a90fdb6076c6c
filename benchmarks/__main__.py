"""The command line: chooses cases, runs a worker per thread count, shows and saves the results."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import fastnn
from benchmarks.case import MODES, Case
from benchmarks.cases import all_cases
from benchmarks.device import CPU, DEVICES, Device
from benchmarks.machine import machine_facts
from benchmarks.plots import MissingMatplotlib, draw, require_matplotlib
from benchmarks.progress import Bar, progress_bar
from benchmarks.results import SCHEMA, complete, key
from benchmarks.table import format_document, threads_text
from benchmarks.timing import Plan
from benchmarks.warm import warm
from benchmarks.worker import Request

ROOT = Path(__file__).resolve().parents[1]


class BenchmarkError(Exception):
    """The benchmark can't run as asked; the message is one sentence for the user."""


@dataclass(frozen=True)
class Options:
    """What the flags ask for."""

    device: Device
    quick: bool
    threads: tuple[int, ...]
    filter: re.Pattern[str]
    modes: tuple[str, ...]
    compile: bool
    seconds: float | None
    json: Path | None
    plots: Path | None
    list: bool
    limit: float | None
    warm: bool

    @property
    def plan(self) -> Plan:
        """How long to measure each contender."""
        plan = self.device.quick_plan if self.quick else self.device.full_plan
        return plan if self.seconds is None else replace(plan, seconds=self.seconds)


# ---- command line --------------------------------------------------------------------------------


def _device(text: str) -> Device:
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a device; the devices are {', '.join(DEVICES)}"
        )
    return DEVICES[text]


def _threads(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and 0 < int(part) <= 1024 for part in parts):
        raise argparse.ArgumentTypeError(f"expected thread counts such as 1,2, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is not a mode; the modes are {', '.join(MODES)}"
        )
    return modes


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing folder")
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Parses and checks the command line; a wrong flag ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure fastnn against its peers, all in turn in one run.",
    )
    add = parser.add_argument
    add("--device", type=_device, default=CPU, metavar="D", help=f"of {', '.join(DEVICES)} (cpu)")
    add("--quick", action="store_true", help="short samples, without torch.compile; in minutes")
    add(
        "--threads",
        type=_threads,
        metavar="N,M",
        help="thread counts, each in a process of its own (1 and all processors; on cuda 1)",
    )
    add(
        "--filter",
        type=_pattern,
        default=re.compile(""),
        metavar="REGEX",
        help="only the cases whose name (see --list) it matches somewhere",
    )
    add("--modes", type=_modes, default=MODES, metavar="M,N", help=f"of {', '.join(MODES)}")
    add("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    add("--seconds", type=_seconds, metavar="S", help="time per contender and case (1; quick 0.15)")
    add("--json", type=_file, metavar="FILE", help="where to save the results")
    add("--plots", type=_folder, metavar="DIR", help="where to draw the results as PNG")
    add("--limit", type=_seconds, metavar="S", help="seconds after which no case is measured")
    add("--warm", action="store_true", help="only compile what is compiled, into the caches")
    add("--list", action="store_true", help="print the cases' names and stop")
    options = Options(**vars(parser.parse_args(arguments)))
    return replace(
        options,
        threads=options.threads or options.device.default_threads(),
        compile=options.compile and not options.quick,
    )


# ---- running -------------------------------------------------------------------------------------


def chosen_cases(options: Options) -> list[Case]:
    """The cases that the flags name."""
    cases = [
        case
        for case in all_cases(options.device)
        if case.mode in options.modes and options.filter.search(case.key)
    ]
    if not cases:
        raise BenchmarkError("no case matches --filter and --modes; --list prints the names")
    return cases


@dataclass
class Findings:
    """What the workers have reported so far."""

    options: Options
    machine: dict[str, str]
    results: list[dict] = field(default_factory=list)
    limits: dict[str, dict | None] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def document(self) -> dict:
        """The results as they are saved."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "command": _command(self.options),
            "limits": self.limits,
            "results": [
                complete(result, self.limits.get(str(result["threads"]))) for result in self.results
            ],
            "complaints": self.complaints,
        }

    def add(self, result: dict) -> None:
        """Adds a result, and saves all, so that nothing is lost should the run be ended."""
        try:
            json.dumps(complete(result, None), allow_nan=False)
        except (ValueError, ZeroDivisionError):
            self.complaints.append(f"failed: {key(result)}: not every number is one above 0")
            return
        self.results.append(result)
        if self.options.json is not None:
            write_json(self.options.json, self.document())


def write_json(path: Path, document: dict) -> None:
    """Writes all or nothing: until the document is written, the file is the one before."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def run(options: Options, cases: list[Case]) -> tuple[dict, list[str]]:
    """Measures everything; returns the document and what went wrong."""
    plan = {threads: _keys(cases, options, threads) for threads in options.threads}
    bar = progress_bar(sum(map(len, plan.values())))
    findings = Findings(options, machine_facts() | options.device.facts())
    end = None if options.limit is None else time.monotonic() + options.limit
    try:
        for threads, keys in plan.items():
            _measure(
                Request(
                    keys,
                    threads,
                    options.compile,
                    options.plan,
                    options.device.limit_seconds(options.plan),
                    options.device.name,
                ),
                end,
                findings,
                bar,
            )
    except KeyboardInterrupt:
        findings.complaints.append("interrupted: what was measured until then is shown")
    finally:
        bar.close()
    return findings.document(), findings.complaints


def _measure(request: Request, end: float | None, findings: Findings, bar: Bar) -> None:
    """Has workers measure the request: another one where one has ended amid the cases."""
    while request.keys:
        keys = list(request.keys)
        reason = _follow(request, end, findings, bar, keys)
        if reason is None:
            return
        if end is not None and time.monotonic() >= end:
            findings.complaints += [f"skipped: {key}: no time left" for key in keys]
            return
        if len(keys) == len(request.keys):
            raise BenchmarkError(f"the process for {threads_text(request.threads)} {reason}")
        request = replace(request, keys=keys, limit_seconds=0.0)


def _follow(
    request: Request, end: float | None, findings: Findings, bar: Bar, keys: list[str]
) -> str | None:
    """Takes down what one worker reports, and its cases off ``keys``; returns how it failed."""
    started = None
    try:
        for event in _events(request, end):
            if event["event"] == "start":
                started = event["key"]
                bar.set_description_str(f"{started}, {threads_text(request.threads)}")
                continue
            if event["event"] == "limits":
                findings.limits.setdefault(str(request.threads), None)
                if event["limits"] is not None:
                    findings.limits[str(request.threads)] = event["limits"]
                continue
            keys.remove(started)
            started = None
            bar.update()
            if event["event"] == "result":
                findings.add(event["result"] | {"elapsed": event["elapsed"]})
            else:
                findings.complaints.append(f"{event['event']}: {event['key']}: {event['reason']}")
    except WorkerEnded as failure:
        if started is not None and (end is None or time.monotonic() < end):
            keys.remove(started)
            findings.complaints.append(f"failed: {started}: its process {failure}")
        return str(failure)
    return None


def _keys(cases: list[Case], options: Options, threads: int) -> list[str]:
    # Peak memory hardly depends on the threads: once is enough.
    first = threads == options.threads[0]
    return [case.key for case in cases if first or case.mode != "memory"]


class WorkerEnded(Exception):
    """A worker has ended before it was done; the message says how."""


def _events(request: Request, end: float | None) -> Iterator[dict]:
    """Starts a worker and yields what it reports, until a moment of ``time.monotonic``."""
    count, device = str(request.threads), DEVICES[request.device]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count} | device.environment,
    )
    timer = threading.Timer(max(0.0, (end or 0.0) - time.monotonic()), process.kill)
    if end is not None:
        timer.start()
    try:
        with suppress(BrokenPipeError):  # it has ended: with what code, its end tells
            process.stdin.write(request.to_json())
            process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() != 0:
            raise WorkerEnded(f"ended with {process.returncode}")
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def _command(options: Options) -> str:
    """The command that measures this again; where results were saved is nobody's business."""
    parts = ["python -m benchmarks"]
    if options.device is not CPU:
        parts.append(f"--device {options.device.name}")
    if options.quick:
        parts.append("--quick")
    parts.append(f"--threads {','.join(map(str, options.threads))}")
    if options.filter.pattern:
        parts.append(f"--filter '{options.filter.pattern}'")
    if options.modes != MODES:
        parts.append(f"--modes {','.join(options.modes)}")
    if not (options.compile or options.quick):
        parts.append("--no-compile")
    if options.limit is not None:
        parts.append(f"--limit {options.limit:g}")
    if options.seconds is not None:
        parts.append(f"--seconds {options.seconds:g}")
    return " ".join(parts)


def present(document: dict, options: Options) -> None:
    """Prints the tables, saves the document and draws the plots."""
    print(format_document(document, colour=sys.stdout.isatty()))
    if options.json is not None:
        write_json(options.json, document)
        print(f"Results: {options.json}")
    if options.plots is not None:
        for path in draw(document, options.plots):
            print(f"Plot: {path}")


def check_setup(options: Options) -> None:
    """Raises where the results would be worthless or could not be drawn."""
    if not fastnn.is_available():
        raise BenchmarkError("fastnn's extension is not built, so that nothing of it can be timed")
    complaint = options.device.complaint()
    if complaint is not None:
        raise BenchmarkError(complaint)
    if options.plots is not None:
        require_matplotlib()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks from the command line and returns the exit code."""
    options = parse_options(arguments)
    try:
        cases = chosen_cases(options)
        if options.list:
            print("\n".join(case.key for case in cases))
            return 0
        check_setup(options)
        if options.warm:
            return warm(options.device, [case.key for case in cases], options.limit)
        document, complaints = run(options, cases)
        present(document, options)
    except (BenchmarkError, MissingMatplotlib) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if any(not complaint.startswith("skipped") for complaint in complaints) else 0


if __name__ == "__main__":
    sys.exit(main())
