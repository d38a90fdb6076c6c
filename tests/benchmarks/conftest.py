"""The benchmarks are not installed with the package, so their folder comes first on the path."""

from __future__ import annotations

import sys

from repository import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
