"""The benchmarks are not installed with the package: their folder comes on the path first."""

from __future__ import annotations

import sys

from repository import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
