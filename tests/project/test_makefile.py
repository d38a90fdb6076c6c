"""The Makefile: `make` lists every command, and the pages name no other."""

from __future__ import annotations

import re
import subprocess

import pytest

from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("the Makefile")

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *REPOSITORY.glob("docs/*.md"),
]


@pytest.fixture(scope="module")
def commands() -> set[str]:
    """The commands that `make` lists."""
    help = subprocess.run(["make"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return set(re.findall(r"^  make ([\w-]+) +\w", help.stdout, re.MULTILINE))


def test_make_lists_every_command(commands):
    makefile = (REPOSITORY / "Makefile").read_text().replace("\\\n", "")
    phony = re.search(r"^\.PHONY: (.+)", makefile, re.MULTILINE)[1].split()
    assert commands == set(phony) - {"help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_that_a_page_names_is_there(page, commands):
    named = re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert set(named) - commands == set()
