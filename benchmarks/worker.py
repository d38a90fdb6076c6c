"""Measures cases at one thread count in its own process, so that OpenMP starts afresh.

    python -m benchmarks.worker     reads a request (JSON) from stdin, prints events (JSON lines)

Events: ``{"event": "limits" | "start" | "result" | "failed" | "skipped", ...}``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from benchmarks import memory, verify
from benchmarks.case import OURS, Case, Contender, Inputs, Unavailable, tf32
from benchmarks.cases import all_cases
from benchmarks.device import DEVICES, Device, Timer, one_line
from benchmarks.limits import best_of, measure_limits
from benchmarks.timing import Plan, Sampler, measure

Emit = Callable[[dict], None]
SEED = 0


@dataclass(frozen=True)
class Request:
    """The cases to measure, and how."""

    keys: list[str]
    threads: int
    compile: bool
    plan: Plan
    limit_seconds: float  # 0: don't measure the device's limits
    device: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        values = json.loads(text)
        return cls(**values | {"plan": Plan(**values["plan"])})


@dataclass
class Outcome:
    """The contenders of a case that can be measured, and the reasons of the others."""

    contenders: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def leave_out(self, contender: Contender, reason: str) -> None:
        """Drops a contender; dropping ours fails the case, which would have nothing to compare."""
        contender.close()
        if contender.name == OURS:
            raise RuntimeError(f"{OURS}: {reason}")
        self.contenders.remove(contender)
        self.skipped[contender.name] = reason


def run(request: Request, emit: Emit) -> None:
    """Measures all cases, with the machine's limits before and after."""
    torch.set_num_threads(request.threads)
    device = DEVICES[request.device]
    logging.getLogger("torch").setLevel(logging.ERROR)  # hides what the compiler says
    if request.compile:
        device.prepare_compiler()
    wanted = set(request.keys)
    cases = [case for case in all_cases(device) if case.key in wanted]
    has_limits = request.limit_seconds > 0 and any(_is_work(case) for case in cases)
    limits = _limits(request, device) if has_limits else None
    emit({"event": "limits", "limits": limits})
    for case in cases:
        emit({"event": "start", "key": case.key})
        try:
            start = time.monotonic()
            event = _run_case(case, request, device)
            emit(event | {"elapsed": time.monotonic() - start})
        except Exception as error:  # a broken case must not lose the others' results
            traceback.print_exc()
            emit({"event": "failed", "key": case.key, "reason": one_line(error)})
        device.check_health()
    if limits is not None:
        again = _limits(request, device)
        emit({"event": "limits", "limits": best_of(limits, again) if again else limits})


def _limits(request: Request, device: Device) -> dict | None:
    """The device's limits; None if they can't be measured, which the cases don't need."""
    try:
        return measure_limits(request.limit_seconds, device)
    except Exception as error:
        logging.getLogger(__name__).error("no limits: %s", one_line(error))
        return None


def _is_work(case: Case) -> bool:
    return case.mode != "memory" and bool(case.work.flops or case.work.bytes)


def _run_case(case: Case, request: Request, device: Device) -> dict:
    reason = _why_not(case, device)
    if reason:
        return {"event": "skipped", "key": case.key, "reason": reason}
    if request.compile:
        # Earlier compiled code would make the compiler generalise over shapes.
        torch._dynamo.reset()
    generator = device.generator(SEED)
    contenders = [one for one in case.contenders() if device.name in one.devices]
    compiles = request.compile and case.compiles
    outcome = Outcome([one for one in contenders if compiles or not one.compiled])
    try:
        if case.mode == "memory":
            summaries = _memory(case, outcome, device)
        else:
            with torch.set_grad_enabled(case.records_graph), tf32(case.tf32):
                _check(case, outcome, generator)
                summaries = _time_all(case, outcome, request.plan, generator, device)
    finally:
        for contender in outcome.contenders:
            contender.close()
    return {"event": "result", "result": _result(case, request, outcome, summaries)}


def _why_not(case: Case, device: Device) -> str | None:
    if case.mode == "memory" and not device.measures_memory():
        return "this system doesn't let a process measure its peak memory"
    if case.peak_bytes > device.available_bytes():
        return f"needs about {case.peak_bytes / 2**30:.0f} GiB of free memory"
    return None


def _check(case: Case, outcome: Outcome, generator: torch.Generator) -> None:
    """Keeps the contenders whose results are right."""
    inputs = verify.check_inputs(case, generator)
    reference = verify.expected(case, inputs)
    case.reference.close()
    for contender in list(outcome.contenders):
        reason = _complaint(case, contender, inputs, reference)
        if reason is not None:
            outcome.leave_out(contender, reason)


def _complaint(case: Case, contender: Contender, inputs, reference) -> str | None:
    try:
        error = verify.error(contender, inputs, reference)
    except Exception as problem:  # peers are private or experimental operators: any may fail
        return one_line(problem)
    if error > case.allowed_error:
        return f"wrong by {error:.1%}, {case.allowed_error:.0e} is allowed"
    return None


class Broken(Exception):
    """A contender that passed the check has failed in a later call."""

    def __init__(self, contender: Contender, problem: Exception) -> None:
        super().__init__(one_line(problem))
        self.contender = contender


def _time_all(
    case: Case, outcome: Outcome, plan: Plan, generator: torch.Generator, device: Device
) -> dict[str, dict]:
    """Times the contenders; if one fails, drops it and starts over."""
    while True:
        try:
            return _time(case, outcome.contenders, plan, generator, device)
        except Broken as broken:
            outcome.leave_out(broken.contender, str(broken))


def _time(
    case: Case,
    contenders: list[Contender],
    plan: Plan,
    generator: torch.Generator,
    device: Device,
) -> dict[str, dict]:
    timers = {contender.name: device.timer() for contender in contenders}

    def draw():
        inputs = case.inputs(generator)
        return {one.name: _sampler(one, inputs, timers[one.name]) for one in contenders}

    summaries = measure(draw, plan, random.Random(SEED), switches=device.interruptions)

    def more(contender: Contender) -> dict:
        return device.more_times(
            lambda: contender.bind(case.inputs(generator)), timers[contender.name]
        )

    return {one.name: summaries[one.name].to_dict() | more(one) for one in contenders}


def _sampler(contender: Contender, inputs: Inputs, timer: Timer) -> Sampler:
    """The contender's sampler; its failures name the contender."""

    def guarded(call: Callable, *args):
        try:
            return call(*args)
        except Exception as problem:
            raise Broken(contender, problem) from problem

    return partial(guarded, guarded(contender.sampler, inputs, timer))


def _memory(case: Case, outcome: Outcome, device: Device) -> dict[str, dict]:
    summaries = {}
    for contender in list(outcome.contenders):
        if contender.overwrites:
            outcome.leave_out(contender, "its gradient overwrites the input and takes no memory")
            continue
        try:
            peak = memory.peak_memory(case, contender.name, device)
            summaries[contender.name] = peak.to_dict()
        except Unavailable as problem:
            outcome.leave_out(contender, one_line(problem))
    return summaries


def _result(case: Case, request: Request, outcome: Outcome, summaries: dict[str, dict]) -> dict:
    contenders = {
        one.name: summaries[one.name]
        | {"trainable": one.trainable, "same_algorithm": one.same_algorithm}
        for one in outcome.contenders
    }
    return {
        "op": case.op,
        "label": case.label,
        "dtype": case.dtype_name,
        "mode": case.mode,
        "threads": request.threads,
        "unit": "bytes" if case.mode == "memory" else "seconds",
        "work": asdict(case.work),
        "contenders": contenders,
        "skipped": outcome.skipped,
    }


def main() -> None:
    """Answers one request; only events go to stdout, whatever libraries print."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: dict) -> None:
        print(json.dumps(event), file=events, flush=True)

    run(Request.from_json(sys.stdin.read()), emit)


if __name__ == "__main__":
    main()
