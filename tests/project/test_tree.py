"""The tests themselves: what several of them share is in tests/support."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("the tests' sources")

TESTS = [*(REPOSITORY / "tests").rglob("test_*.py"), *(REPOSITORY / "tests").rglob("conftest.py")]


def imported_by(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_no_test_imports_another():
    """It would no longer run by itself, nor move without the other one."""
    names = {path.stem for path in TESTS}
    assert len(names) > 40
    found = {path.name: names.intersection(imported_by(path)) for path in TESTS}
    assert {name: imports for name, imports in found.items() if imports} == {}
