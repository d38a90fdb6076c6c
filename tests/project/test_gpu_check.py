"""``make gpu-check`` without a GPU: how steps are run, and that their scripts work together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from repository import REPOSITORY

GPU = REPOSITORY / "tools/gpu"
sys.path.insert(0, str(GPU))

import check  # noqa: E402
import steps  # noqa: E402
from check import Check, Result  # noqa: E402
from steps import Step  # noqa: E402

pytestmark = pytest.mark.cpu_only("the script that runs the tests on a GPU")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def summary(out: Path) -> dict[str, dict]:
    return {result["step"]: result for result in json.loads((out / "summary.json").read_text())}


def run(out: Path, *chosen: Step, seconds: float = 60) -> dict[str, dict]:
    Check(out, seconds).run(chosen)
    return summary(out)


def test_a_failed_step_stops_no_other(tmp_path):
    results = run(
        tmp_path,
        Step("bad", python("print('why'); raise SystemExit(7)"), 30, 0),
        Step("good", python("print('fine')"), 30, 1),
    )
    assert (results["bad"]["status"], results["bad"]["returncode"]) == ("failed", 7)
    assert results["bad"]["tail"] == "why\n"
    assert (results["good"]["status"], results["good"]["returncode"]) == ("passed", 0)
    log = (tmp_path / "log.txt").read_text()
    assert "===== bad\nwhy\n" in log and "===== good\nfine\n" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.json"]


def test_a_step_that_can_not_be_started_stops_no_other(tmp_path):
    results = run(
        tmp_path, Step("bad", ["/no/such/program"], 30, 0), Step("good", python(""), 30, 0)
    )
    assert results["bad"]["status"] == "failed" and "/no/such/program" in results["bad"]["tail"]
    assert results["good"]["status"] == "passed"


def test_a_result_is_saved_before_the_next_phase_begins(tmp_path):
    reads = (
        "import json; "
        f"print([r['step'] for r in json.load(open({str(tmp_path / 'summary.json')!r}))])"
    )
    results = run(tmp_path, Step("first", python(""), 30, 0), Step("second", python(reads), 30, 1))
    assert results["second"]["tail"] == "['first']\n"


def test_steps_of_a_phase_run_side_by_side(tmp_path):
    """Each step waits for a file that the other one creates."""
    meets = (
        "import pathlib, time, sys; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    results = run(
        tmp_path / "out",
        Step("one", [*python(meets), a, b], 20, 0),
        Step("two", [*python(meets), b, a], 20, 0),
    )
    assert {result["status"] for result in results.values()} == {"passed"}


def test_a_step_that_hangs_is_stopped_and_what_it_says_then_is_kept(tmp_path):
    hangs = (
        "import time\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('so far: 3 of 5')"
    )
    results = run(tmp_path, Step("slow", python(hangs), 6, 0), Step("next", python(""), 30, 1))
    assert results["slow"]["status"] == "out of time"
    assert "so far: 3 of 5" in results["slow"]["tail"]
    assert results["next"]["status"] == "passed"


def test_a_step_that_does_not_listen_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "GRACE_SECONDS", 0.5)
    child = tmp_path / "child"
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen(['sh', '-c', 'sleep 6; touch {child}'])\n"
        "time.sleep(60)"
    )
    results = run(tmp_path / "out", Step("deaf", python(deaf), 3, 0))
    assert (results["deaf"]["status"], results["deaf"]["returncode"]) == ("out of time", -9)
    time.sleep(4)
    assert not child.exists()


def test_steps_are_not_begun_when_the_time_is_over(tmp_path):
    results = run(tmp_path, Step("late", python(""), 30, 0), seconds=1)
    assert (results["late"]["status"], results["late"]["tail"]) == ("not run", "no time was left")


def test_a_step_whose_program_is_missing_is_not_run(tmp_path):
    results = run(tmp_path, Step("profile", ["no-such-tool"], 30, 0, needs="no-such-tool"))
    assert results["profile"]["status"] == "not run"
    assert results["profile"]["tail"] == "no-such-tool is not on the PATH"


def test_a_step_that_is_done_already_is_not_run(tmp_path):
    fails = python("raise SystemExit(1)")
    results = run(
        tmp_path,
        Step("done", fails, 30, 0, done_if=python("")),
        Step("to do", fails, 30, 0, done_if=fails),
    )
    assert results["done"]["status"] == "passed"
    assert results["to do"]["status"] == "failed"


def test_a_question_whether_a_step_is_done_has_a_limit_too(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "DONE_IF_SECONDS", 0.5)
    slow = python("import time; time.sleep(30)")
    assert run(tmp_path, Step("step", python(""), 30, 0, done_if=slow))["step"]["returncode"] == 0


def test_what_an_earlier_run_has_left_is_not_this_run_s(tmp_path):
    for name in ("junit.xml", "bench.json", "bench.txt", "ncu.csv", "summary.json"):
        (tmp_path / name).write_text("<testsuites><testsuite><testcase/></testsuite></testsuites>")
    results = run(
        tmp_path,
        Step("tests", python("raise SystemExit(4)"), 30, 0, junit="junit.xml"),
        Step("bench", python("print('new')"), 30, 0, writes=("bench.json",), output="bench.txt"),
    )
    assert results["tests"]["tests"] == {} and results["tests"]["failures"] == []
    assert (tmp_path / "bench.txt").read_text() == "new\n"
    # Files that no step of this run writes remain.
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench.txt", "ncu.csv", "summary.json", "log.txt",
    }  # fmt: skip


def test_a_step_is_told_how_long_it_may_take(tmp_path):
    command = [*python("import sys; print(sys.argv[1])"), "{seconds}"]
    results = run(tmp_path, Step("told", command, 100, 0), seconds=60)
    assert 20 < int(results["told"]["tail"]) < 60 - steps.TO_SPARE


# Bounds a hang, in seconds; no load of the machine reaches it.
HANGS = 300


@pytest.mark.parametrize("starts", [False, True], ids=["runs", "starts"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_told_to_end_its_steps_end_too_and_are_in_the_summary(tmp_path, number, starts):
    """It may be told so even while the step starts."""
    child, go_on = tmp_path / "child", tmp_path / "go on"
    program = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(GPU)!r})
from pathlib import Path
import check, steps

log = Path({str(tmp_path / "out/.long.log")!r})

class ToldAtOnce(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        while not log.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), {int(number)})

if {starts}:
    check.subprocess.Popen = ToldAtOnce
check.why_no_gpu = lambda: None
script = "echo begun; while [ ! -e '{go_on}' ]; do sleep 0.1; done; touch {child}"
check.steps = lambda out: [steps.Step("long", ["sh", "-c", script], {HANGS}, 0)]
sys.exit(check.main(["--out", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True)
    try:
        if not starts:
            log = tmp_path / "out/.long.log"
            while process.poll() is None and not (log.exists() and log.read_text()):
                time.sleep(0.05)
            process.send_signal(number)
        process.communicate(timeout=HANGS)
    finally:
        go_on.touch()
        process.kill()
    assert process.returncode == 1
    result = summary(tmp_path / "out")["long"]
    assert (result["status"], result["tail"]) == ("interrupted", "begun\n")
    assert "===== long\nbegun" in (tmp_path / "out/log.txt").read_text()
    time.sleep(2)  # a step that continues checks ten times a second whether it may
    assert not child.exists()


def test_the_tests_that_failed_are_named(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "def test_c(): pytest.skip('no')\n@pytest.fixture\ndef f(): 1 / 0\ndef test_d(f): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", str(tmp_path / "test_some.py")]
    step = Step("tests", [*command, f"--junitxml={tmp_path}/junit.xml"], 60, 0, junit="junit.xml")
    result = run(tmp_path, step)["tests"]
    assert result["status"] == "failed"
    assert result["tests"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [name.rpartition("::")[2] for name in result["failures"]] == ["test_b", "test_d"]


def test_a_hidden_report_of_tests_goes_when_it_has_been_read(tmp_path):
    for name in ("junit.xml", ".junit-large.xml"):
        path = tmp_path / name
        path.write_text("<testsuites><testsuite><testcase name='t'/></testsuite></testsuites>")
        assert check.take_junit(path)[0]["passed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["junit.xml"]


def test_without_a_report_of_tests_there_are_no_counts(tmp_path):
    (tmp_path / "half.xml").write_text("<testsuites><testsuite>")
    assert (
        check.read_junit(tmp_path / "half.xml") == check.read_junit(tmp_path / "no.xml") == ({}, [])
    )


def test_a_line_of_the_report_says_why_a_step_did_not_run():
    ran = Result("tests", "failed", 12.34, 1, {"passed": 5, "failed": 1, "skipped": 0}, tail="...")
    assert check.line(ran).split() == [
        "tests",
        "failed",
        "12.3",
        "s",
        "5",
        "passed,",
        "1",
        "failed",
    ]
    assert check.line(Result("ncu", "not run", tail="no time was left")).endswith(
        "no time was left"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence():
    process = subprocess.run(
        [sys.executable, str(GPU / "check.py")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("gpu-check: torch ") and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "available", "sentence"),
    [
        (None, False, "is built without CUDA"),
        ("13.0", False, "torch finds no GPU here"),
        ("13.0", True, None),
    ],
)
def test_what_is_missing_is_named(monkeypatch, version, available, sentence):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    reason = check.why_no_gpu()
    assert reason is None if sentence is None else sentence in reason


def test_an_unknown_step_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as ended:
        check.parse(["--only", "smoke,benhc"], ["smoke", "bench"])
    assert ended.value.code == 2
    assert "there is no step 'benhc'; the steps are smoke, bench" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-5", "0", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        check.parse([f"--seconds={text}"], ["smoke"])
    assert "expected a number of seconds above 0" in capsys.readouterr().err


def test_results_go_into_a_folder(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit):
        check.parse(["--out", str(file)], ["smoke"])
    assert f"{file} is not a folder" in capsys.readouterr().err


def test_steps_can_be_chosen():
    assert check.parse(["--only", "bench,smoke"], ["smoke", "bench"]).only == ["bench", "smoke"]
    assert check.parse([], ["smoke", "bench"]).only == ["smoke", "bench"]


def test_the_steps_fit_the_time_and_what_is_timed_runs_alone():
    all_steps = steps.steps(Path("out"))
    assert len({step.name for step in all_steps}) == len(all_steps)
    for name in ("ceilings", "bench", "ncu"):
        (phase,) = (step.phase for step in all_steps if step.name == name)
        assert sum(step.phase == phase for step in all_steps) == 1


WITHOUT_EXPECTTEST = """
import sys
sys.modules["expecttest"] = None  # as if it were not installed
sys.path.insert(0, "tools/gpu")
import importlib.util
importlib.util.find_spec = lambda name, find=importlib.util.find_spec: (
    None if name == "expecttest" else find(name)
)
import pytest, steps
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *steps.TESTS]))
"""


def test_the_tests_on_the_device_are_collected_without_expecttest():
    process = subprocess.run(
        python(WITHOUT_EXPECTTEST),
        cwd=steps.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-2000:]
    assert "tests/ops/test_operators.py" in process.stdout
    assert "tests/ops/test_torch_inputs.py" not in process.stdout


def test_the_results_are_at_most_eight_files():
    files = {"summary.json", "log.txt"}.union(*(step.files for step in steps.steps(Path("out"))))
    assert len([name for name in files if not name.startswith(".")]) <= 8


@pytest.mark.parametrize("script", ["smoke.py", "launches.py"])
def test_the_scripts_refuse_an_extension_without_cuda(script):
    """Otherwise the reference would pass every check."""
    code = (
        "import runpy, sys; sys.argv = ['script', '--device', 'cuda']; "
        f"sys.path.insert(0, {str(GPU)!r}); from fastnn import _extension; "
        "_extension.build_info = lambda: {'cuda': False}; "
        f"runpy.run_path({str(GPU / script)!r}, run_name='__main__')"
    )
    process = subprocess.run(
        python(code), capture_output=True, text=True, check=False, env=check.environment({})
    )
    assert process.returncode == 1
    assert "fastnn is built without its CUDA part here" in process.stderr


def test_what_the_steps_name_is_there():
    for step in steps.steps(Path("out")):
        for word in step.command:
            if word.startswith(("tests/", "tools/")):
                assert (steps.REPOSITORY / word).exists(), word


@pytest.mark.parametrize(
    "script", [["smoke.py"], ["launches.py"], ["launches.py", "--no-library"]], ids=str
)
def test_the_scripts_run_on_the_cpu(script: list[str]):
    """A rehearsal that reveals faults of the script itself without a GPU."""
    process = subprocess.run(
        [sys.executable, str(GPU / script[0]), *script[1:], "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        env=check.environment({}),
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
