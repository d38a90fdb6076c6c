"""Runs random user programs with torch and with fastnn side by side: see ``make fuzz``.

    python -m fuzz [--minutes 5] [--seed N] [--only modules,losses]

Prints the smallest program that shows each difference. The exit status is 1 if there is one. If a
program crashes this process, it is in build/fuzz/last.py.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from itertools import cycle

from repository import REPOSITORY

from .program import Program
from .search import KINDS, Search

# The number of programs drawn from a seed; it then takes a few seconds to shrink a difference.
EXAMPLES = 100
LAST = REPOSITORY / "build/fuzz/last.py"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    print(f"fuzz: --seed {options.seed}", flush=True)
    LAST.parent.mkdir(parents=True, exist_ok=True)
    searches = [Search(kind, before=save) for kind in options.only]
    until = time.monotonic() + 60 * options.minutes
    for turn, search in enumerate(cycle(searches)):
        if time.monotonic() > until:
            break
        for found, program in search.look(options.seed + turn, EXAMPLES).items():
            print(f"--- {search.kind}: {found}\n{program.source}", flush=True)
    for search in searches:
        print(f"{search.kind}: {search.runs:,} programs, {len(search.found)} differences")
    return int(any(search.found for search in searches))


def save(program: Program) -> None:
    LAST.write_text(program.source)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="of searching (5)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="(random)")
    parser.add_argument("--only", metavar="A,B", default=",".join(KINDS), help="(%(default)s)")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    unknown = [kind for kind in options.only if kind not in KINDS]
    if unknown:
        parser.error(f"there are no programs of {unknown[0]!r}; choose from {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
