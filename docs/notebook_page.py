"""A Sphinx extension: makes a page of the example's notebook, with the outputs that it holds."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from sphinx.application import Sphinx

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quadratic.ipynb"


def write_page(app: Sphinx) -> None:
    """Writes docs/_notebook/quadratic.md and its pictures."""
    folder = Path(app.srcdir) / "_notebook"
    folder.mkdir(exist_ok=True)
    parts = []
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
        for output in cell.get("outputs", []):
            picture = folder / f"{NOTEBOOK.stem}_{number}.png"
            parts.append(_shown(output, picture))
    page = folder / f"{NOTEBOOK.stem}.md"
    page.write_text("\n\n".join(parts) + "\n")


def _shown(output: dict, picture: Path) -> str:
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]).rstrip(), "text")
    picture.write_bytes(base64.b64decode(output["data"]["image/png"]))
    return f"![{''.join(output['data']['text/plain'])}]({picture.name})"


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_page)
    return {"parallel_read_safe": True}
