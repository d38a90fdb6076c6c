"""python -m benchmarks: its arguments, and a quick run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import results
from benchmarks.cases import all_cases
from benchmarks.device import CPU, CUDA
from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_command_line_chooses_and_records_the_device():
    options = cli.parse_options(["--device", "cuda"])
    assert (options.device, options.threads) == (CUDA, (1,))
    assert cli._command(options) == "python -m benchmarks --device cuda --threads 1"
    assert cli.parse_options(["--device", "cuda", "--threads", "2"]).threads == (2,)
    options = cli.parse_options(["--threads", "1"])
    assert options.device is CPU
    assert cli._command(options) == "python -m benchmarks --threads 1"
    assert cli.parse_options([]).threads == CPU.default_threads()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "'tpu' is not a device; the devices are cpu, cuda"),
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
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *flags, "--json", str(saved)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = saved.read_text()
    document = json.loads(text)
    wanted = [case.key for case in all_cases() if case.op == "overhead"]
    assert [results.key(result) for result in document["results"]] == wanted
    assert all(result["contenders"]["fastnn"]["median"] > 0 for result in document["results"])
    assert "fastnn is ahead of the best peer in" in done.stdout
    assert str(REPOSITORY) not in text and str(tmp_path) not in text
