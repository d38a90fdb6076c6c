"""The command line: chooses cases, runs a worker per thread count, shows and saves results."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fastnn
from benchmarks.arguments import seconds
from benchmarks.case import MODES, Case
from benchmarks.cases import all_cases
from benchmarks.device import CPU, DEVICES, Device
from benchmarks.machine import machine_facts
from benchmarks.plots import MissingMatplotlib, draw, require_matplotlib
from benchmarks.progress import progress_bar
from benchmarks.run import BenchmarkError, Run
from benchmarks.table import format_document
from benchmarks.timing import Plan
from benchmarks.warm import warm
from benchmarks.worker import Request


@dataclass(frozen=True)
class Options:
    """The parsed flags."""

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
    add("--seconds", type=seconds, metavar="S", help="time per contender and case (1; quick 0.15)")
    add("--json", type=_file, metavar="FILE", help="where to save the results")
    add("--plots", type=_folder, metavar="DIR", help="where to draw the results as PNG")
    add("--limit", type=seconds, metavar="S", help="seconds after which no case is measured")
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
    """The cases that the flags select."""
    cases = [
        case
        for case in all_cases(options.device)
        if case.mode in options.modes and options.filter.search(case.key)
    ]
    if not cases:
        raise BenchmarkError("no case matches --filter and --modes; --list prints the names")
    return cases


def run(options: Options, cases: list[Case]) -> Run:
    """Measures all cases, as far as the time allows."""
    keys = {threads: _keys(cases, options, threads) for threads in options.threads}
    bar = progress_bar(sum(map(len, keys.values())))
    machine = machine_facts() | options.device.facts()
    end = math.inf if options.limit is None else time.monotonic() + options.limit
    measured = Run(_command(options), machine, options.json, bar, end)
    try:
        for threads in options.threads:
            measured.measure(_request(options, threads, keys[threads]))
    except KeyboardInterrupt:
        measured.complaints.append("interrupted: what was measured until then is shown")
    finally:
        bar.close()
    return measured


def _request(options: Options, threads: int, keys: list[str]) -> Request:
    plan, device = options.plan, options.device
    return Request(keys, threads, options.compile, plan, device.limit_seconds(plan), device.name)


def _keys(cases: list[Case], options: Options, threads: int) -> list[str]:
    # Peak memory hardly depends on the number of threads, so once is enough.
    first = threads == options.threads[0]
    return [case.key for case in cases if first or case.mode != "memory"]


def _command(options: Options) -> str:
    """The command that repeats this measurement, without the flags for saving."""
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


def present(measured: Run, options: Options) -> None:
    """Prints the tables, saves the document and draws the plots."""
    document = measured.document()
    print(format_document(document, colour=sys.stdout.isatty()))
    if options.json is not None:
        measured.save()
        print(f"Results: {options.json}")
    if options.plots is not None:
        for path in draw(document, options.plots):
            print(f"Plot: {path}")


def check_setup(options: Options) -> None:
    """Raises if the results would be worthless or could not be drawn."""
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
        measured = run(options, cases)
        present(measured, options)
    except (BenchmarkError, MissingMatplotlib) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    for complaint in measured.complaints:
        print(complaint, file=sys.stderr)
    return int(any(not complaint.startswith("skipped") for complaint in measured.complaints))


if __name__ == "__main__":
    sys.exit(main())
