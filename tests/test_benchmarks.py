"""The benchmarks' own arithmetic and command line. What they measure is no test's business."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed with the package

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import limits, memory, plots, report, results, table, verify  # noqa: E402
from benchmarks.case import Function, Inputs, Work  # noqa: E402
from benchmarks.cases import all_cases, sgd  # noqa: E402
from benchmarks.device import Device  # noqa: E402
from benchmarks.timing import Plan, Summary, measure, summarise, time_calls  # noqa: E402

pytestmark = pytest.mark.cpu_only("the benchmarks")

PLAN = Plan(seconds=0.1, sample_seconds=0.01, min_rounds=3)


class Fake:
    """A contender whose calls take a given time by its own clock, and a log of the samples."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int, int]]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def sampler(self, draw: int):
        def sample(count: int) -> float:
            self.log.append((self.name, count, draw))
            return self.seconds * count

        return sample


def measure_fakes(times: dict[str, float], clock=lambda: 0.0, plan: Plan = PLAN):
    """Measures fakes; returns the summaries and the log of (name, count, number of the draw)."""
    log: list[tuple[str, int, int]] = []
    fakes = [Fake(name, seconds, log) for name, seconds in times.items()]
    draws = iter(range(10**6))

    def draw():
        number = next(draws)
        return {fake.name: fake.sampler(number) for fake in fakes}

    return measure(draw, plan, random.Random(0), clock), log


def make_result(times: dict[str, float], **changes) -> dict:
    contenders = {
        name: {
            "median": seconds,
            "low": seconds,
            "high": seconds,
            "least": seconds,
            "samples": 1,
            "interruptions": 0.0,
            "trainable": name != "inference",
            "same_algorithm": True,
        }
        for name, seconds in times.items()
    }
    result = {
        "op": "op",
        "label": "4 x 4",
        "dtype": "float32",
        "mode": "forward",
        "threads": 1,
        "unit": "seconds",
        "work": {"flops": 0.0, "bytes": 0.0},
        "contenders": contenders,
        "skipped": {},
    }
    return result | changes


LIMITS = {"gemm": {"float32": 1e9, "bfloat16": 2e9}, "copy": {"1000": 4e9, "8000": 1e9}}


def make_document(*documents_results: dict) -> dict:
    return {
        "schema": results.SCHEMA,
        "machine": {
            "cpu": "A Processor",
            "processors": "2",
            "os": "Some OS",
            "torch": "2.13.0",
            "fastnn": "0.1.0",
            "capability": "avx2",
            "capability of torch": "AVX2",
            "date": "2026-01-02",
        },
        "command": "python -m benchmarks --threads 1",
        "limits": {"1": LIMITS},
        "results": [results.complete(result, LIMITS) for result in documents_results],
    }


WON = make_result({"fastnn": 1e-3, "slow": 4e-3, "quick": 2e-3}, op="won")
LOST = make_result({"fastnn": 1e-3, "ahead": 0.5e-3}, op="lost")


# ---- timing --------------------------------------------------------------------------------------


def test_measure_reports_each_contenders_time_per_call():
    summaries, _ = measure_fakes({"a": 1e-3, "b": 3e-3})
    assert summaries["a"].median == pytest.approx(1e-3)
    assert summaries["b"].median == pytest.approx(3e-3)


def test_measure_takes_contenders_in_turn_in_changing_order():
    _, log = measure_fakes({"a": 1e-3, "b": 1e-3, "c": 1e-3}, plan=Plan(1.0, 0.01, 3))
    samples = [name for name, count, _ in log if count == 10]  # the others are warm-up
    samples = samples[len(samples) % 3 :]
    rounds = [tuple(samples[i : i + 3]) for i in range(0, len(samples), 3)]
    assert len(rounds) >= 50
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


def test_measure_draws_fresh_inputs_in_each_round_where_that_is_cheap():
    summaries, log = measure_fakes({"a": 1e-3})
    assert len({draw for *_, draw in log}) == summaries["a"].samples >= 10


def test_measure_keeps_its_inputs_where_drawing_takes_long():
    ticks = iter(range(10**6))
    _, log = measure_fakes({"a": 1e-3}, clock=lambda: float(next(ticks)))
    assert {draw for *_, draw in log} == {0}


def test_measure_takes_the_least_number_of_rounds_of_slow_calls():
    summaries, log = measure_fakes({"a": 60.0})
    assert summaries["a"].samples == PLAN.min_rounds
    assert len(log) == PLAN.min_rounds + 1  # and one call to warm up


def test_measure_warms_up_before_each_sample_of_quick_calls():
    _, log = measure_fakes({"a": 1e-3, "b": 1e-3})
    counts = [count for _, count, _ in log]
    assert counts[-8:] == [1, 10] * 4


def test_measure_counts_the_interruptions_of_each_contenders_samples():
    interrupted = iter(range(10**6))  # one more each time it is asked
    fakes = {"a": lambda count: 0.01, "b": lambda count: 0.02}
    summaries = measure(
        lambda: fakes, PLAN, random.Random(0), lambda: 0.0, lambda: next(interrupted)
    )
    assert summaries["a"].interruptions == pytest.approx(100)
    assert summaries["b"].interruptions == pytest.approx(50)


def test_summary_is_median_and_quartiles():
    summary = summarise([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (summary.low, summary.median, summary.high) == (2.0, 3.0, 5.0)
    assert (summary.least, summary.samples) == (1.0, 5)
    assert summarise([4.0]) == Summary(4.0, 4.0, 4.0, 4.0, 1)


def test_time_calls_makes_all_calls_and_synchronises():
    log: list[str] = []
    device = Device("fake", lambda: log.append("synchronise"))
    assert time_calls(lambda: log.append("call"), 3, device) > 0
    assert log == ["synchronise", "call", "call", "call", "synchronise"]


# ---- results -------------------------------------------------------------------------------------


def test_ratios_and_best_peers():
    result = results.complete(
        make_result({"fastnn": 2.0, "slow": 8.0, "quick": 3.0, "inference": 1.0}), None
    )
    assert result["ratios"] == {"slow": 4.0, "quick": 1.5, "inference": 0.5}
    assert (result["best"], result["best_trainable"]) == ("inference", "quick")
    assert results.best_ratio(result) == 0.5


def test_share_of_the_limit():
    gemm = make_result({"fastnn": 1.0, "peer": 1.0}, work={"flops": 5e8, "bytes": 0.0})
    assert results.complete(gemm, LIMITS)["share"] == pytest.approx(0.5)
    assert limits.limit_for(Work(flops=1), "bfloat16", LIMITS) == 2e9
    # The copy of the next larger size, of the largest where none is larger.
    moved = [limits.limit_for(Work(bytes=size), "float32", LIMITS) for size in (9, 1001, 10**6)]
    assert moved == [4e9, 1e9, 1e9]
    assert results.complete(make_result({"fastnn": 1.0}), LIMITS)["share"] is None


def test_memory_is_compared_in_whole_mebibytes():
    def ratio(ours: int, peer: int) -> float:
        result = make_result({"fastnn": ours, "peer": peer}, unit="bytes", mode="memory")
        return results.complete(result, None)["ratios"]["peer"]

    assert ratio(0, 4096) == 1
    assert ratio(2 * 2**20 + 4096, 6 * 2**20) == 3


def test_overall_counts_wins_and_finds_the_worst():
    document = make_document(WON, LOST, make_result({"fastnn": 1.0}))
    facts = results.overall(document["results"])
    assert (facts["cases"], facts["ahead"]) == (2, 1)
    assert facts["geometric_mean"] == pytest.approx(1.0)  # of 2 and 0.5
    assert facts["worst"]["op"] == "lost"
    assert results.overall([]) is None


def test_best_of_two_limits():
    other = {"gemm": {"float32": 3e9, "bfloat16": 1e9}, "copy": {"1000": 1.0, "8000": 2e9}}
    assert limits.best_of(LIMITS, other) == {
        "gemm": {"float32": 3e9, "bfloat16": 2e9},
        "copy": {"1000": 4e9, "8000": 2e9},
    }


# ---- verification --------------------------------------------------------------------------------


def test_error_is_relative_and_sees_wrong_gradients():
    x = torch.randn(50, requires_grad=True)
    right, wrong = (
        Function("a", torch.sum),
        Function("b", lambda x: x.sum() + 0.1 * x.detach().sum()),
    )
    reference = list(verify._tensors(right.check(Inputs((x,)).double())))
    assert verify.error(right, Inputs((x,)), reference) < 1e-6
    assert verify.error(wrong, Inputs((x,)), reference) == pytest.approx(0.1, rel=1e-3)
    halved = Function("c", lambda x: x.sum() - 0.5 * (x - x.detach()).sum())
    assert verify.error(halved, Inputs((x,)), reference) == pytest.approx(0.5, rel=1e-3)
    nan = Function("d", lambda x: x.sum() * float("nan"))
    assert verify.error(nan, Inputs((x,)), reference) == float("inf")


def test_every_case_has_a_name_of_its_own_and_ours_among_its_contenders():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        names = [contender.name for contender in case.contenders()]
        assert names.count("fastnn") == 1
        assert len(set(names)) == len(names) > 1


def test_resnet18_has_its_parameters():
    shapes = sgd.resnet18()
    assert len(shapes) == 62
    assert sum(torch.Size(shape).numel() for shape in shapes) == 11_689_512


@pytest.mark.skipif(not memory.supported(), reason="the system does not reset a process's peak")
def test_peak_memory_sees_what_a_call_allocates():
    growth = memory._growth_of(lambda: torch.ones(8 * 2**20))
    assert growth == pytest.approx(32 * 2**20, rel=0.1)


# ---- table and report ----------------------------------------------------------------------------


def test_table_marks_losses():
    lines = table.format_document(make_document(WON, LOST)).splitlines()
    rows = [line for line in lines if "4 x 4" in line and "fwd" in line]
    assert [row.rstrip().endswith("!") for row in rows] == [False, True]
    assert "2.00" in rows[0] and "4.00" in rows[0]
    assert "in 1 of 2 cases" in lines[-1] and "worst 0.50x (lost" in lines[-1]


def test_table_and_report_say_when_the_machine_was_busy():
    busy = make_result({"fastnn": 1.0, "peer": 2.0})
    busy["contenders"]["fastnn"]["interruptions"] = 100.0
    document = make_document(WON, busy)
    assert "in 1 of 2 cases: with" in table.format_document(document)
    assert "processor time in 1 of 2 cases" in report.markdown(document, [])
    assert "Other programs" not in table.format_document(make_document(WON))
    assert "Other programs" not in report.markdown(make_document(WON), [])


def test_a_ratio_just_below_one_does_not_read_as_one():
    assert table.ratio_text(0.9999) == "0.99"
    assert table.ratio_text(1.0) == "1.00"


def write_readme(folder: Path, text: str) -> tuple[Path, Path]:
    readme, saved = folder / "README.md", folder / "results.json"
    readme.write_text(text)
    saved.write_text(json.dumps(make_document(WON, LOST)))
    return readme, saved


def test_report_replaces_what_is_between_the_markers(tmp_path: Path):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    readme, saved = write_readme(tmp_path, text)
    arguments = [str(saved), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    assert report.main(arguments) == 0
    once = readme.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\n") and once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once
    assert "A Processor" in once and "2026-01-02" in once and "1 thread" in once
    assert "**0.50x**" in once  # losses are shown
    assert "(plots/ratio.png)" in once
    assert (tmp_path / "plots" / "ratio.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(arguments) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["no markers", f"{report.END}\n{report.BEGIN}", report.BEGIN])
def test_report_refuses_a_readme_without_markers(tmp_path: Path, text: str, capsys):
    readme, saved = write_readme(tmp_path, text)
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert "the readme needs one" in capsys.readouterr().err
    assert readme.read_text() == text


def test_report_refuses_other_files(tmp_path: Path, capsys):
    readme, saved = write_readme(tmp_path, f"{report.BEGIN}{report.END}")
    saved.write_text("[]")
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert report.main([str(tmp_path / "none"), "--readme", str(readme)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "holds no results" in errors[0] and "can't be read" in errors[1]


def test_plots_show_what_there_is(tmp_path: Path):
    drawn = plots.draw(make_document(WON, LOST), tmp_path)
    assert [path.name for path in drawn] == ["ratio.png"]  # none of these has a limit


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "0"], "expected thread counts such as 1,2, got '0'"),
        (["--threads", "1,x"], "expected thread counts such as 1,2, got '1,x'"),
        (["--modes", "backward"], "'backward' is not a mode; the modes are forward"),
        (["--filter", "("], "'(' is not a regular expression"),
        (["--seconds", "-1"], "expected a number of seconds above 0, got '-1'"),
        (["--json", "no/such/folder/file.json"], "is not a file in an existing folder"),
        (["--filter", "no such case"], "no case matches --filter and --modes"),
    ],
)
def test_bad_arguments_give_one_sentence(flags: list[str], message: str, capsys):
    try:
        code = cli.main(flags)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_quick_run_writes_valid_json(tmp_path: Path):
    saved = tmp_path / "results.json"
    flags = ["--quick", "--seconds", "0.01", "--filter", "overhead", "--threads", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *flags, "--json", str(saved)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    text = saved.read_text()
    document = json.loads(text)
    wanted = [case.key for case in all_cases() if case.op == "overhead"]
    assert [results.key(result) for result in document["results"]] == wanted
    assert all(result["contenders"]["fastnn"]["median"] > 0 for result in document["results"])
    assert "fastnn is ahead of the best peer in" in run.stdout
    assert str(ROOT) not in text and str(tmp_path) not in text
