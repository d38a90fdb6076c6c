"""The documentation's text agrees with the sources; `make docs` builds it and runs its examples."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

import fastnn
from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("the documentation")

PAGES = [
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]


def read(path: str) -> str:
    return (REPOSITORY / path).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_roles(page):
    """GitHub shows them as text; docs/linked_names.py links plain code instead."""
    assert not re.findall(r"\{\w+\}`.*", page.read_text())


# --- what the messages mean -----------------------------------------------------------------------


def text_of(node: ast.expr) -> str:
    """A string's text with an ellipsis for each variable part; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages(path: str) -> Iterator[str]:
    """A file's messages to the user: from exceptions, calls that end the build, and returns."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("fail", "NotBuildable", "print"):
                yield text_of(node.args[0])
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            yield text_of(node.value.elts[-1])


SOURCES = ("setup.py", "build_support/cuda_toolkit.py", "fastnn/_extension.py")
MESSAGES = [message for path in SOURCES for message in messages(path) if message.strip(" …")]
EXPLAINED = re.findall(r"^`([^`]+)`\n: ", read("docs/install.md"), re.MULTILINE)


def test_there_are_messages():
    """Guards against a search that finds nothing, which would pass the tests below."""
    assert len(MESSAGES) == len(EXPLAINED) == 27


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_every_message_is_explained(message):
    assert len([start for start in EXPLAINED if message.startswith(start)]) == 1


@pytest.mark.parametrize("start", EXPLAINED)
def test_every_message_explained_is_one_of_ours(start):
    assert any(message.startswith(start) for message in MESSAGES)


# Functions that are called with the name of a variable and read it.
READERS = r"getenv|requested_product|environ\.get|environment\.get"


def test_every_variable_is_listed():
    sources = [REPOSITORY / "setup.py", *REPOSITORY.glob("csrc/**/*.c*"), *SOURCES]
    read_there = {
        name
        for path in sources
        for name in re.findall(rf'(?:{READERS})\("(\w+)"', (REPOSITORY / path).read_text())
    }
    first_cells = re.findall(r"^\| (`.+?) \|", read("docs/install.md"), re.MULTILINE)
    listed = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    assert {"FASTNN_CUDA", "FASTNN_CPU_CAPABILITY", "FASTNN_CPU_GEMM"} <= read_there
    assert read_there - {"PATH"} == listed


# --- names ----------------------------------------------------------------------------------------


def test_the_api_pages_hold_every_public_name():
    page = "".join(path.read_text() for path in (REPOSITORY / "docs").glob("api*.md"))
    package = set(re.findall(r"autofunction:: (\w+)|autoclass:: (\w+)", page))
    documented = {name for names in package for name in names if name}
    modules = set(re.findall(r"automodule:: fastnn\.(\w+)\n   :members:", page))
    assert set(fastnn.__all__) - {"__version__"} <= documented | modules


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page):
    folders = "benchmarks|csrc|examples|fastnn|tests|tools"
    named = re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text())
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("name", ["log_softmax", "sgd"])
def test_the_page_on_the_design_names_every_file_of_an_operator(name):
    folders = ("csrc", "fastnn", "tests", "tools", "benchmarks")
    files = [
        path.relative_to(REPOSITORY).as_posix()
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*")
        if re.fullmatch(rf"{name}(_kernels)?\.(h|cpp|cu|cuh|py)", path.name)
    ]
    assert len(files) > 7
    page = read("docs/design.md")
    assert [file for file in files if f"`{file}`" not in page] == []


def test_the_places_on_the_page_on_the_design_are_counted():
    operator, _tests, optimizer = re.findall(
        r"((?:^\| \d+ \| .*\n)+)", read("docs/design.md"), re.MULTILINE
    )
    files = re.findall(r"^### (\d+)\.", read("docs/design.md"), re.MULTILINE)
    numbers = [*files, *re.findall(r"^\| (\d+) ", operator, re.MULTILINE)]
    assert numbers == [str(number) for number in range(1, 16)]
    assert "these are the 15 places" in read("docs/design.md")
    assert f"SGD touches {optimizer.count(chr(10))} places" in read("docs/design.md")
