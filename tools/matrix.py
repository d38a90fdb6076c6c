"""Builds and tests fastnn for several versions of PyTorch and Python: see ``make test-matrix``.

``python tools/matrix.py 2.9.1 2.15.0`` runs two of them. Each has a copy of the repository in
build/matrix, with an environment of its own. The results go into docs/install.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from repository import REPOSITORY, copy_to

# The oldest and the newest PyTorch, each with a Python of its time, and two between them.
PYTHONS = {
    "2.9.1": "python3.10",
    "2.11.0": "python3.12",
    "2.13.0": "python3.11",
    "2.15.0": "python3.13",
}
TESTS = [
    "tests/ops",
    "tests/nn",
    "tests/optim",
    "tests/transforms",
    "tests/programs/test_saving.py",
    "tests/project/test_torch_names.py",
]
PAGE = REPOSITORY / "docs/install.md"
BEGIN, END = "<!-- versions:begin -->\n", "<!-- versions:end -->\n"
HEADER = (
    "| PyTorch | Python | passed | failed | skipped | expected to fail |\n"
    "| --- | --- | ---: | ---: | ---: | ---: |\n"
)


@dataclass(frozen=True)
class Counts:
    passed: int
    failed: int
    skipped: int
    xfailed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help=f"of PyTorch; default: {', '.join(PYTHONS)}")
    versions = parser.parse_args().versions or list(PYTHONS)
    check(versions)
    counts = {}
    for version in versions:
        counts[version] = run(version)
        PAGE.write_text(with_row(PAGE.read_text(), version, counts[version]))
    print(HEADER + "".join(row(version, found) for version, found in counts.items()), end="")
    if any(found.failed for found in counts.values()):
        sys.exit(1)


def check(versions: list[str]) -> None:
    """Ends this program if one of them can't be run."""
    for version in versions:
        if version not in PYTHONS:
            sys.exit(f"matrix.py: torch is one of {', '.join(PYTHONS)}, not {version}.")
        if shutil.which(PYTHONS[version]) is None:
            sys.exit(
                f"matrix.py: {PYTHONS[version]}, for torch {version}, is not on the PATH; install "
                "it or name the versions to run, such as `make test-matrix ARGS=2.13.0`."
            )


def run(version: str) -> Counts:
    """Builds for a version of PyTorch, and runs the tests."""
    folder = REPOSITORY / "build/matrix" / version
    print(f"--- torch {version}, {PYTHONS[version]}", flush=True)
    copy_to(folder)
    make = ["make", "build", "VENV=.venv", f"TORCH=torch=={version}", f"PYTHON={PYTHONS[version]}"]
    # Without the options of the make that runs this.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    built = subprocess.run(make, cwd=folder, env={**environment, "FASTNN_CUDA": "0"}, check=False)
    if built.returncode != 0:
        sys.exit(f"matrix.py: torch {version}: the build failed (see above).")
    report = folder / "build/tests.xml"
    report.unlink(missing_ok=True)  # an earlier run's
    pytest = [".venv/bin/python", "-m", "pytest", f"--junitxml={report}", *TESTS]
    tested = subprocess.run(pytest, cwd=folder, check=False)
    if not report.exists():
        sys.exit(f"matrix.py: torch {version}: the tests ended with {tested.returncode}.")
    return counts_in(report)


def counts_in(report: Path) -> Counts:
    """The counts in a report in JUnit's format."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    tests, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    xfailed = len(suite.findall(".//skipped[@type='pytest.xfail']"))
    return Counts(tests - skipped - failed, failed, skipped - xfailed, xfailed)


def row(version: str, counts: Counts) -> str:
    numbers = (counts.passed, counts.failed, counts.skipped, counts.xfailed)
    cells = [version, PYTHONS[version].removeprefix("python"), *(f"{n:,}" for n in numbers)]
    return f"| {' | '.join(cells)} |\n"


def with_row(page: str, version: str, counts: Counts) -> str:
    """The page with this row in its table; the rows of other versions stay."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    lines = table.splitlines(keepends=True)
    rows = {line.split()[1]: line for line in lines[HEADER.count("\n") :]}
    rows[version] = row(version, counts)
    body = "".join(rows[version] for version in PYTHONS if version in rows)
    return f"{before}{BEGIN}{HEADER}{body}{END}{after}"


if __name__ == "__main__":
    main()
