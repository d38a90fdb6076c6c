"""The repository's folder, and copies of it to build in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def copy_to(folder: Path) -> None:
    """Copies the files that git tracks or would add; unchanged ones stay, and stay built."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    names = listed.stdout.split("\0")
    wanted = {folder / name for name in names if (REPOSITORY / name).is_file()}
    modules = (f"{name}/**/*.py" for name in ("build_support", "fastnn", "tests", "tools"))
    for pattern in ("csrc/**/*", *modules):
        for path in folder.glob(pattern):
            if path.is_file() and path not in wanted:  # deleted since; it would be compiled or run
                path.unlink()
    for name in names:
        source, target = REPOSITORY / name, folder / name
        if not source.is_file():
            continue
        if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
