"""fastnn._when_imported: acts once, after the module's own code, however the module is imported."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastnn._when_imported import when_imported

pytestmark = pytest.mark.cpu_only("of no kernels")

NAME = "imported_for_a_test"


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """The file of a module that isn't imported yet."""
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the file may change within a second
    yield path
    sys.modules.pop(NAME, None)


@pytest.fixture
def acted(source) -> list[int]:
    """The module's value at the time of each action."""
    values: list[int] = []
    when_imported(NAME, lambda module: values.append(module.value))
    return values


def is_awaited() -> bool:
    return any(getattr(finder, "name", "") == NAME for finder in sys.meta_path)


def test_a_module_that_is_imported_already(source):
    import_module(NAME)
    finders, values = list(sys.meta_path), []
    when_imported(NAME, lambda module: values.append(module.value))
    assert (values, sys.meta_path) == ([1], finders)


def test_a_module_that_is_imported_later(acted):
    assert acted == [] and NAME not in sys.modules
    import_module(NAME)
    assert (acted, is_awaited()) == ([1], False)


def test_another_module(acted, source):
    source.with_name("another_for_a_test.py").write_text("")
    import_module("another_for_a_test")
    assert (acted, is_awaited()) == ([], True)


def test_a_search_is_no_import(acted):
    assert find_spec(NAME).origin.endswith(f"{NAME}.py")
    assert (acted, is_awaited()) == ([], True)
    import_module(NAME)
    assert acted == [1]


def test_an_import_that_fails_can_be_repeated(acted, source):
    source.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        import_module(NAME)
    assert (acted, is_awaited()) == ([], True)
    source.write_text("value = 20")
    import_module(NAME)
    assert (acted, is_awaited()) == ([20], False)


def test_a_module_that_does_not_exist(acted, source):
    source.unlink()
    with pytest.raises(ModuleNotFoundError, match=NAME):
        import_module(NAME)
    assert acted == []


def test_finders_behind_it_are_asked(acted):
    """A finder may lack find_spec, as some did before Python 3.12."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            asked.append(name)

    asked: list[str] = []
    sys.meta_path[1:1] = [Finder(), object()]
    import_module(NAME)
    assert (acted, asked) == ([1], [NAME])


def test_two_that_wait_for_one_module(acted):
    when_imported(NAME, lambda module: acted.append(-module.value))
    import_module(NAME)
    assert (sorted(acted), is_awaited()) == ([-1, 1], False)
