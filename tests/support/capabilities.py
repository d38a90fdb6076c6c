"""The matrix in docs/capabilities.md, made from the tests: which operator supports what.

A test declares what it shows: ``@pytest.mark.capability("compile", "in one graph")``, a section and
a row. The columns are the operators and modules that its parameters name, or ``operators=``. If
PyTorch or fastnn doesn't support it, the test is an expected failure, and the matrix shows its
reason. ``make capabilities`` runs these tests and writes the file if all went as expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastnn._operators import CHAINS, OPERATORS, OPTIMIZERS

SECTIONS = {
    "compile": "torch.compile",
    "export": "Export",
    "autograd": "Autograd and torch.func",
    "precision": "Mixed precision",
    "saving": "Saving, moving, parametrizing",
    "processes": "Processes and threads",
    "tools": "Tools",
    "inputs": "PyTorch's own test inputs",
}
COLUMNS = tuple(record.name for record in (*OPERATORS, *CHAINS, *OPTIMIZERS))
# Other names for them in the tests' parameters: their modules.
ALIASES = {operator.module: operator.name for operator in OPERATORS}

HEADER = """\
# What works with what

Made by `make capabilities` from the tests that show it, which `make test` runs too: "yes" where all
tests of a cell pass, "no" where they fail as expected, with the reason; nothing where a question
makes no sense.
"""


@dataclass(frozen=True)
class Finding:
    """What one test says about one cell; a reason turns it into a no."""

    section: str
    row: str
    column: str
    file: str
    reason: str | None


def findings_of(item: pytest.Item) -> Iterator[Finding]:
    """The findings of a test, from its markers and parameters."""
    for marker in item.iter_markers("capability"):
        section, row = marker.args
        columns = marker.kwargs.get("operators") or _columns_named_by(item)
        unknown = {section} - set(SECTIONS) | set(columns) - set(COLUMNS)
        if unknown or not columns:
            raise pytest.UsageError(f"{item.nodeid}: {marker}: unknown {unknown or 'operator'}")
        expected_failure = item.get_closest_marker("xfail")
        reason = expected_failure.kwargs["reason"] if expected_failure else None
        for column in columns:
            yield Finding(section, row, column, item.path.name, reason)


def _columns_named_by(item: pytest.Item) -> list[str]:
    """A parameter names an operator or its module, perhaps followed by an option."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec is not None else ()
    names = (getattr(value, "name", value) for value in values)
    names = (re.split("[-,]", name)[0] for name in names if isinstance(name, str))
    return [name for name in (ALIASES.get(name, name) for name in names) if name in COLUMNS]


def document(findings: Iterable[Finding]) -> str:
    """The contents of docs/capabilities.md, in Markdown."""
    rows: dict[str, dict[str, list[Finding]]] = {section: {} for section in SECTIONS}
    for finding in findings:
        rows[finding.section].setdefault(finding.row, []).append(finding)
    tables = (_table(section, found) for section, found in rows.items() if found)
    return "\n".join([HEADER, *tables])


def _table(section: str, rows: dict[str, list[Finding]]) -> str:
    lines = [f"## {SECTIONS[section]}", "", f"| | {' | '.join(COLUMNS)} | tests |"]
    lines.append("|---|" + ":-:|" * len(COLUMNS) + "---|")
    reasons: dict[str, int] = {}
    for row, findings in rows.items():
        cells = [_cell([f for f in findings if f.column == column], reasons) for column in COLUMNS]
        files = ", ".join(f"`{file}`" for file in sorted({f.file for f in findings}))
        lines.append(f"| {row} | {' | '.join(cells)} | {files} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes, *([""] if notes else [])])


def _cell(findings: list[Finding], reasons: dict[str, int]) -> str:
    if not findings:
        return ""
    numbers = {reasons.setdefault(f.reason, len(reasons) + 1) for f in findings if f.reason}
    return f"no ({', '.join(map(str, sorted(numbers)))})" if numbers else "yes"


class Recorder:
    """Writes the document from the tests that ran, if all of them did as they say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.findings: list[Finding] = []
        self.skipped: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self.findings.extend(findings_of(item))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.skipped:
            pytest.exit(f"{self.path} is not written: skipped {self.skipped}", returncode=1)
        if exitstatus == pytest.ExitCode.OK:
            self.path.write_text(document(self.findings))
