"""The README is short, its programs run, and its links reach a file and a heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastnn
from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("the documentation")

README = (REPOSITORY / "README.md").read_text()
# Sphinx checks the links between pages in docs; these files are also read elsewhere.
LINKING = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1300


def test_the_pages_own_their_text():
    pages = (REPOSITORY / "docs").glob("*.md")
    assert [page.name for page in pages if "{include} ../README" in page.read_text()] == []


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """GitHub's anchors for a page's headings, which Sphinx uses, too."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", LINKING)
def test_every_link_reaches_a_file_and_a_heading(name):
    page = REPOSITORY / name
    targets = re.findall(r"\]\(([^)]+)\)", without_code(page.read_text()))
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        reached = (page.parent / file).resolve() if file else page
        assert reached.exists(), target
        assert not anchor or anchor in anchors(reached), target


def test_the_readme_links_every_page_that_explains_a_claim():
    pages = "install fuse train_step linear_cross_entropy numerics capabilities limits faq design"
    pages += " performance performance_cuda testing"
    missing = [page for page in pages.split() if f"](docs/{page}.md" not in README]
    assert missing == []


# --- its programs ---------------------------------------------------------------------------------

BEFORE_AFTER, STEP, EXISTING = re.findall(
    r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE
)


def run(program: str, names: dict) -> dict:
    exec(compile(program, "README.md", "exec"), names)
    return names


def columns(program: str) -> tuple[str, str]:
    """The programs before and after, which are shown side by side."""
    width = program.splitlines()[0].index("import torch, fastnn")
    lines = [(line[:width].rstrip(), line[width:]) for line in program.splitlines()]
    before, after = ("\n".join(part) for part in zip(*lines, strict=True))
    return before, after


def test_before_and_after_are_the_same_network():
    torch.manual_seed(0)
    before = run(columns(BEFORE_AFTER)[0], {})
    torch.manual_seed(0)
    after = run(columns(BEFORE_AFTER)[1], {})
    batch, target = torch.randn(4, 784), torch.arange(4)
    losses = [names["loss_fn"](names["model"](batch), target) for names in (before, after)]
    torch.testing.assert_close(*losses)
    assert type(before["optimizer"]) is torch.optim.SGD
    assert type(after["optimizer"]) is fastnn.optim.SGD
    assert before["optimizer"].defaults["lr"] == after["optimizer"].defaults["lr"]


def test_the_loop_in_one_call_trains():
    names = run(columns(BEFORE_AFTER)[1], {})
    batch = (torch.randn(16, 784), torch.arange(16) % 10)
    first = names["loss_fn"](names["model"](batch[0]), batch[1])
    run(STEP, names | {"batches": [batch] * 5})
    assert names["loss_fn"](names["model"](batch[0]), batch[1]) < first


def test_an_existing_model_is_fused(capsys):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"fastnn": fastnn, "torch": torch, "model": model, "optimizer": optimizer}
    run(EXISTING, names)
    assert "2 fused" in capsys.readouterr().out
    assert type(names["optimizer"]) is fastnn.optim.SGD


def test_every_issue_form_asks_for_the_environment():
    forms = [
        path
        for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
        if path.name != "config.yml"
    ]
    assert len(forms) >= 3
    for form in forms:
        assert "output of `python -m fastnn.env`" in form.read_text(), form.name
