"""Makes a notebook from a script and runs it, so that it contains the script's pictures.

    python examples/make_notebook.py examples/quadratic.py

A cell of the script starts with a line "# %%", or "# %% [markdown]" if it is text in comments.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode, v4
from traitlets.config import Config

TEXT = "[markdown]"


def notebook_of(script: Path) -> NotebookNode:
    """The script's cells, not run yet."""
    before, *cells = re.split(r"^# %%(.*)\n", script.read_text(), flags=re.MULTILINE)
    if before.strip() or not cells:
        raise ValueError(f"{script}: expected a line '# %%' at the top")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(metadata={"kernelspec": kernel})
    for kind, source in zip(cells[::2], cells[1::2], strict=True):
        notebook.cells.append(_cell(kind.strip(), source.strip()))
        notebook.cells[-1].id = str(len(notebook.cells))  # it would be drawn at random
    return notebook


def _cell(kind: str, source: str) -> NotebookNode:
    if kind == TEXT:
        return v4.new_markdown_cell(re.sub(r"^# ?", "", source, flags=re.MULTILINE))
    return v4.new_code_cell(source)


def run(notebook: NotebookNode) -> None:
    """Runs the cells and stores their output; stops at the first error."""
    # Through a Unix socket: by default the kernel listens on a port, and warns about it.
    config = Config({"KernelManager": {"transport": "ipc"}})
    NotebookClient(notebook, timeout=120, record_timing=False, config=config).execute()
    # The rest describes this machine: the version of its Python.
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}


def main(arguments: list[str]) -> None:
    for script in map(Path, arguments):
        notebook = notebook_of(script)
        run(notebook)
        nbformat.write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
