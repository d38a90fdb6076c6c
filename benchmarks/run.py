"""A run: the workers that measure, their events, and the file that is saved after each case."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.device import DEVICES
from benchmarks.progress import Bar
from benchmarks.results import SCHEMA, complete, key
from benchmarks.table import threads_text
from benchmarks.worker import Request

ROOT = Path(__file__).resolve().parents[1]


class BenchmarkError(Exception):
    """The benchmark can't run as requested; the message is one sentence for the user."""


class WorkerEnded(Exception):
    """A worker ended early; the message says how."""


@dataclass
class Run:
    """The results so far, and the means to measure more.

    ``end`` is the time (of ``time.monotonic``) at which the run ends, finished or not.
    """

    command: str
    machine: dict[str, str]
    json: Path | None
    bar: Bar
    end: float = math.inf
    results: list[dict] = field(default_factory=list)
    limits: dict[str, dict | None] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def document(self) -> dict:
        """The results in the form that is saved."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "command": self.command,
            "limits": self.limits,
            "results": [
                complete(result, self.limits.get(str(result["threads"]))) for result in self.results
            ],
            "complaints": self.complaints,
        }

    def measure(self, request: Request) -> None:
        """Has a worker measure the cases, and another one the rest if it ends early."""
        while request.keys:
            left = list(request.keys)
            reason = self._follow(request, left)
            if reason is None:
                return
            if time.monotonic() >= self.end:
                self.complaints += [f"skipped: {key}: no time left" for key in left]
                return
            if len(left) == len(request.keys):
                raise BenchmarkError(f"the process for {threads_text(request.threads)} {reason}")
            request = replace(request, keys=left, limit_seconds=0.0)

    def _follow(self, request: Request, left: list[str]) -> str | None:
        """Records a worker's events and removes its cases from ``left``; returns how it failed."""
        started = None
        try:
            for event in worker_events(request, self.end):
                if event["event"] == "start":
                    started = event["key"]
                    self.bar.set_description_str(f"{started}, {threads_text(request.threads)}")
                elif event["event"] == "limits":
                    known = self.limits.get(str(request.threads))
                    self.limits[str(request.threads)] = event["limits"] or known
                else:
                    left.remove(started)
                    started = None
                    self.bar.update()
                    self._take(event)
                    self.save()
        except WorkerEnded as failure:
            if started is not None and time.monotonic() < self.end:
                left.remove(started)
                self.complaints.append(f"failed: {started}: its process {failure}")
            return str(failure)
        return None

    def _take(self, event: dict) -> None:
        """Records how a case ended."""
        if event["event"] != "result":
            self.complaints.append(f"{event['event']}: {event['key']}: {event['reason']}")
            return
        result = event["result"] | {"elapsed": event["elapsed"]}
        try:
            json.dumps(complete(result, None), allow_nan=False)
        except (ValueError, ZeroDivisionError):
            self.complaints.append(f"failed: {key(result)}: not every number is one above 0")
            return
        self.results.append(result)

    def save(self) -> None:
        """Saves all results so far, so that nothing is lost if the run is killed."""
        if self.json is not None:
            write_json(self.json, self.document())


def write_json(path: Path, document: dict) -> None:
    """Writes atomically: the old file stays until the document is complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def worker_events(request: Request, end: float) -> Iterator[dict]:
    """Starts a worker and yields its events; kills it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=DEVICES[request.device].worker_environment(request.threads),
    )
    seconds = max(0.0, end - time.monotonic())
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), process.kill)
    timer.daemon = True
    timer.start()
    try:
        with suppress(BrokenPipeError):  # the worker has ended; its exit code is checked below
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
