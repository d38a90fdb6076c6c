"""What pages of the documentation show of a run: the tables of train_step and of the heads."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.case import OURS
from benchmarks.overview import machines
from benchmarks.results import best_ratio
from benchmarks.table import MODE_NAMES, amount, markdown_table, ratio_text

STEP_HEADER = ("model, batch", "threads", "loop, fused model", "torch", "fastest peer")
HEAD_HEADER = ("rows, features->classes", "", "threads", OURS)
#: The peers of a head by the start of their names. Of those with several options the best counts.
HEADS = (
    "F.linear, F.cross_entropy",
    "torch.compile",
    "torch.compile, auto-chunker",
    "F.linear_cross_entropy",
    "jax.jit",
)


def step_section(document: dict) -> str:
    """The times of a step by the loop and by ``train_step``, and the ratios to its peers."""
    steps = _by_case(document, "train_step")
    rows = [
        [_model(label), str(threads), *_step_cells(loop), *_step_cells(steps[label, threads])]
        for (label, threads), loop in _by_case(document, "MLP step").items()
        if (label, threads) in steps
    ]
    header = [*STEP_HEADER, "`train_step`", *STEP_HEADER[3:]]
    return "\n\n".join([markdown_table(header, rows, 1), machines([document])])


def head_section(document: dict) -> str:
    """The time and memory of a head with its loss, and the ratios to its peers."""
    of_heads = [one for one in document["results"] if one["op"] == "linear + cross_entropy"]
    order = list(dict.fromkeys(one["label"] for one in of_heads))
    rows = [
        [
            one["label"],
            MODE_NAMES[one["mode"]],
            str(one["threads"]),
            _ours(one),
            *(_best_of(one, peer) for peer in HEADS),
        ]
        for one in sorted(of_heads, key=lambda one: order.index(one["label"]))
    ]
    header = [*HEAD_HEADER, *(f"`{peer}`" for peer in HEADS)]
    return "\n\n".join([markdown_table(header, rows, 2), machines([document])])


def _by_case(document: dict, op: str) -> dict[tuple[str, int], dict]:
    results = [one for one in document["results"] if one["op"] == op]
    return {(one["label"], one["threads"]): one for one in results}


def _model(label: str) -> str:
    """A case's model and batch, which its label gives where they are not the usual ones."""
    if label.startswith("batch of "):
        return f"784-128-64-10, CrossEntropyLoss, {label.removeprefix('batch of ')}"
    return f"{label}, CrossEntropyLoss, 64" if "-" in label else f"784-128-64-10, {label}, 64"


def _step_cells(result: dict) -> Sequence[str]:
    peer = f"{ratio_text(best_ratio(result))}x ({result['best'].split(',')[0]})"
    return _ours(result), f"{ratio_text(result['ratios']['torch'])}x", peer


def _ours(result: dict) -> str:
    return amount(result["contenders"][OURS]["median"], result["unit"])


def _best_of(result: dict, peer: str) -> str:
    """The least ratio of a peer's forms; empty if it is missing."""
    forms = [ratio for name, ratio in result["ratios"].items() if _peer_of(name) == peer]
    return f"{ratio_text(min(forms))}x" if forms else ""


def _peer_of(contender: str) -> str | None:
    starts = [peer for peer in HEADS if f"{contender}, ".startswith(f"{peer}, ")]
    return max(starts, key=len, default=None)
