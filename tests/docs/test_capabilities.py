"""docs/capabilities.md is what the tests say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from repository import REPOSITORY
from support.capabilities import COLUMNS, Finding, Recorder, document
from support.marks import needs_extension

pytestmark = pytest.mark.cpu_only("of no kernels")

DOCUMENT = REPOSITORY / "docs" / "capabilities.md"


@needs_extension
def test_the_document_is_up_to_date(tmp_path):
    """It has a cell for each marked test, and says yes or no as the test is expected to."""
    tests = (REPOSITORY / "tests").rglob("test_*.py")
    marked = [path for path in tests if "mark.capability" in path.read_text()]
    path = tmp_path / "capabilities.md"
    options = ["--collect-only", "-m", "capability", "--capabilities", path]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *sorted(marked)]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout
    assert DOCUMENT.read_text() == path.read_text(), "run `make capabilities`"


def test_a_cell_is_yes_if_all_its_tests_are():
    def finding(column: str, reason: str | None) -> Finding:
        return Finding("export", "jit", column, "test_export.py", reason)

    findings = [
        finding("linear_relu", None),
        finding("linear_relu", "It is slow."),
        finding("linear_relu", "It is old."),
        finding("nll_loss", "It is old."),
        finding("SGD", None),
    ]
    *_, row, gap, first, second, end = [*document(findings).rstrip().splitlines(), ""]
    cells = {"linear_relu": "no (1, 2)", "nll_loss": "no (2)", "SGD": "yes"}
    expected = [cells.get(column, "") for column in COLUMNS]
    assert row == f"| jit | {' | '.join(expected)} | `test_export.py` |"
    assert (gap, first, second, end) == ("", "1. It is slow.", "2. It is old.", "")


def test_a_run_that_failed_or_skipped_writes_nothing(tmp_path):
    path = tmp_path / "capabilities.md"
    recorder = Recorder(path)
    recorder.pytest_sessionfinish(exitstatus=pytest.ExitCode.TESTS_FAILED)
    assert not path.exists()
    recorder.skipped.append("test_export.py::test_onnx")
    with pytest.raises(pytest.exit.Exception, match=r"skipped.*test_onnx"):
        recorder.pytest_sessionfinish(exitstatus=pytest.ExitCode.OK)
    assert not path.exists()
    recorder.skipped.clear()
    recorder.pytest_sessionfinish(exitstatus=pytest.ExitCode.OK)
    assert path.read_text() == document([])
