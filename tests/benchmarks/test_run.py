"""benchmarks.run: workers that measure, and the file that is saved after each case."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import machine, run, worker
from support.benchmark_fakes import LIMITS, FakeGpu, make_result, raiser

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_run_records_the_facts_of_the_device(monkeypatch):
    monkeypatch.setattr(run, "worker_events", lambda request, end: iter([]))
    options = cli.parse_options(["--threads", "1", "--filter", "overhead"])
    assert "gpu" not in cli.run(options, []).machine
    assert cli.run(replace(options, device=FakeGpu().device()), []).machine["gpu"] == "A GPU"


def test_inductor_has_a_cache_for_each_limited_instruction_set(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("FASTNN_CPU_CAPABILITY", raising=False)
    assert machine.compiler_cache() == {}
    monkeypatch.setenv("FASTNN_CPU_CAPABILITY", "avx2")
    assert machine.compiler_cache()["TORCHINDUCTOR_CACHE_DIR"].endswith("avx2")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    assert machine.compiler_cache() == {}


def run_workers(workers: list, monkeypatch, **changes) -> tuple[run.Run, list[worker.Request]]:
    """Runs three cases; each worker is a list of events, and an exception among them is raised."""
    requests: list[worker.Request] = []

    def events(request: worker.Request, end: float):
        requests.append(request)
        for event in workers[len(requests) - 1]:
            if isinstance(event, Exception):
                raise event
            yield event() if callable(event) else event

    monkeypatch.setattr(run, "worker_events", events)
    monkeypatch.setattr(cli, "_keys", lambda *args: ["a", "b", "c"])
    options = replace(cli.parse_options(["--threads", "1"]), **changes)
    return cli.run(options, []), requests


def measured(key: str, seconds: float = 1.0) -> list[dict]:
    result = make_result({"fastnn": seconds, "peer": 2.0}, op=key)
    return [
        {"event": "start", "key": key},
        {"event": "result", "result": result, "elapsed": 0.5},
    ]


def test_a_worker_that_dies_takes_only_its_case_along(monkeypatch):
    start = {"event": "start", "key": "b"}
    limited = {"event": "limits", "limits": LIMITS}
    workers = [
        [limited, *measured("a"), start, run.WorkerEnded("ended with -11")],
        [{"event": "limits", "limits": None}, *measured("c")],
    ]
    found, requests = run_workers(workers, monkeypatch)
    assert [result["op"] for result in found.results] == ["a", "c"]
    assert found.results[0]["elapsed"] == 0.5
    assert found.complaints == ["failed: b: its process ended with -11"]
    assert found.limits == {"1": LIMITS}
    assert [request.keys for request in requests] == [["a", "b", "c"], ["c"]]
    assert requests[0].limit_seconds > requests[1].limit_seconds == 0


def test_a_worker_that_dies_before_its_first_case_ends_the_run(monkeypatch):
    with pytest.raises(run.BenchmarkError, match="for 1 thread ended with 1"):
        run_workers([[run.WorkerEnded("ended with 1")]], monkeypatch)


def test_the_limit_ends_a_run_and_keeps_what_was_measured(monkeypatch):
    start = {"event": "start", "key": "b"}

    def passes() -> dict:
        time.sleep(0.05)
        return start

    workers = [[*measured("a"), passes, run.WorkerEnded("ended with -9")]]
    found, _ = run_workers(workers, monkeypatch, limit=0.05)
    assert [result["op"] for result in found.results] == ["a"]
    assert found.complaints == ["skipped: b: no time left", "skipped: c: no time left"]
    assert found.document()["complaints"] == found.complaints


def test_a_limit_that_has_passed_kills_the_worker(tmp_path: Path, capsys):
    saved = tmp_path / "results.json"
    flags = ["--limit", "0.1", "--filter", "SGD.step", "--threads", "1", "--json", str(saved)]
    start = time.monotonic()
    assert cli.main(flags) == 0
    assert time.monotonic() - start < 30  # the worker would take longer just to import torch
    said = "skipped: overhead SGD.step float32 call: no time left"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert json.loads(saved.read_text())["complaints"] == [said]


def test_results_are_saved_after_each_case(tmp_path: Path, monkeypatch):
    saved = tmp_path / "results.json"
    found: list[list[str]] = []

    def look() -> dict:
        document = json.loads(saved.read_text())
        found.append([result["op"] for result in document["results"]] + document["complaints"])
        return {"event": "limits", "limits": None}

    failed = [
        {"event": "start", "key": "b"},
        {"event": "failed", "key": "b", "reason": "no kernel"},
    ]
    run_workers([[*measured("a"), look, *failed, look]], monkeypatch, json=saved)
    assert found == [["a"], ["a", "failed: b: no kernel"]]
    assert list(tmp_path.iterdir()) == [saved]


def test_a_file_of_results_is_replaced_as_a_whole(tmp_path: Path, monkeypatch):
    saved = tmp_path / "results.json"
    run.write_json(saved, {"a": 1})
    monkeypatch.setattr(Path, "replace", raiser(OSError()))
    with pytest.raises(OSError):
        run.write_json(saved, {"a": 2})
    assert json.loads(saved.read_text()) == {"a": 1}


@pytest.mark.parametrize("seconds", [0.0, float("nan")])
def test_a_time_that_makes_no_sense_spoils_no_other_case(seconds: float, monkeypatch):
    found, _ = run_workers([[*measured("a", seconds), *measured("b")]], monkeypatch)
    assert [result["op"] for result in found.results] == ["b"]
    assert found.complaints == ["failed: a 4 x 4 float32 forward: not every number is one above 0"]
