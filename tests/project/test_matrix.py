"""tools/matrix.py: its counts, the table that it writes, and the places that name its versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import matrix
from matrix import BEGIN, END, HEADER, PYTHONS, Counts
from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("a tool")

SUITE = """
import pytest

def test_passes(): pass
def test_passes_too(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_has_an_error(broken): pass
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.mark.xfail
@pytest.mark.parametrize("i", range(3))
def test_is_expected_to_fail(i): assert False
"""


def test_counts_of_a_report(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "--junitxml=report.xml", "-c", "/dev/null"]
    subprocess.run([*command, "test_suite.py"], cwd=tmp_path, capture_output=True, check=False)
    assert matrix.counts_in(tmp_path / "report.xml") == Counts(2, 2, 1, 3)


def test_a_row_replaces_that_of_its_version_and_keeps_the_order():
    page = f"before\n{BEGIN}{HEADER}| 2.13.0 | old |\n| 2.9.1 | kept |\n{END}after\n"
    written = matrix.with_row(page, "2.13.0", Counts(12345, 0, 1, 8))
    rows = "| 2.9.1 | kept |\n| 2.13.0 | 3.11 | 12,345 | 0 | 1 | 8 |\n"
    assert written == f"before\n{BEGIN}{HEADER}{rows}{END}after\n"


@pytest.mark.parametrize(
    ("arguments", "pythons", "message"),
    [
        (["2.8.0"], "python3", "torch is one of 2.9.1, 2.11.0, 2.13.0, 2.15.0, not 2.8.0"),
        (["2.9.1"], "no-such-python", "no-such-python, for torch 2.9.1, is not on the PATH"),
    ],
)
def test_what_can_t_be_run_is_said_before_anything_is_built(
    monkeypatch, arguments, pythons, message
):
    monkeypatch.setattr(matrix, "PYTHONS", dict.fromkeys(PYTHONS, pythons))
    monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments])
    monkeypatch.setattr(matrix, "run", lambda version: pytest.fail("it was run"))
    with pytest.raises(SystemExit, match=re.escape(message)):
        matrix.main()


@pytest.mark.parametrize(("failed", "status"), [(0, None), (1, 1)])
def test_a_failure_is_in_the_page_and_in_the_status(tmp_path, monkeypatch, capsys, failed, status):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}{HEADER}{END}")
    monkeypatch.setattr(matrix, "PAGE", page)
    monkeypatch.setattr(matrix, "PYTHONS", dict.fromkeys(PYTHONS, "python3"))
    monkeypatch.setattr(matrix, "run", lambda version: Counts(7, failed, 0, 0))
    monkeypatch.setattr(sys, "argv", ["matrix.py", "2.9.1"])
    if status is None:
        matrix.main()
    else:
        with pytest.raises(SystemExit) as ended:
            matrix.main()
        assert ended.value.code == status
    assert f"| 2.9.1 | 3 | 7 | {failed} | 0 | 0 |" in page.read_text()
    assert capsys.readouterr().out == HEADER + f"| 2.9.1 | 3 | 7 | {failed} | 0 | 0 |\n"


def test_all_test_files_are_there():
    assert [name for name in matrix.TESTS if not (REPOSITORY / name).exists()] == []


def test_the_workflow_runs_the_same_versions():
    workflow = (REPOSITORY / ".github/workflows/ci.yml").read_text()
    named = re.findall(r'torch: "(.+)", python: "(.+)"', workflow)
    assert {torch: f"python{python}" for torch, python in named} == PYTHONS


def test_the_page_has_a_row_for_each_version():
    page = Path(matrix.PAGE).read_text()
    table = page.split(BEGIN)[1].split(END)[0].removeprefix(HEADER)
    assert [line.split()[1] for line in table.splitlines()] == list(PYTHONS)
