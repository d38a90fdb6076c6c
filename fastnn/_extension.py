"""Loads the built extension once, and decides what runs the operators.

If it is missing or doesn't fit the installed torch, :mod:`fastnn.reference` (the same functions in
plain PyTorch) replaces it, with one warning: a pickled model then still loads and gives the right
numbers.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch.compiler import is_compiling

from fastnn import _operators, reference
from fastnn._torch import tracing_state

REINSTALL = "reinstall it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
HIDDEN = "this source folder hides the installed fastnn: start Python in another folder"

_BUILD_INFO_FILE = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, Any]:
    """What setup.py recorded when it built the extension; empty if nothing was built."""
    if not _BUILD_INFO_FILE.exists():
        return {}
    return json.loads(_BUILD_INFO_FILE.read_text())


def _hides_another() -> bool:
    """Whether Python was started in a source folder although a built fastnn is installed."""
    installed = (str(one.locate_file("fastnn")) for one in metadata.distributions(name="fastnn"))
    return any(Path(folder, _BUILD_INFO_FILE.name).exists() for folder in installed)


def _load() -> tuple[Any, str]:
    """The extension module and "", or None and the reason in one sentence."""
    info = build_info()
    if not info:
        return None, f"its extension is not built ({HIDDEN if _hides_another() else REINSTALL})"
    # Checked before the import, which would fail with an undefined symbol.
    if info["torch"] != torch.__version__:
        return None, (
            f"its extension was built for torch {info['torch']} and torch {torch.__version__} "
            f"is installed ({REINSTALL})"
        )
    try:
        return import_module("fastnn._C"), ""
    except ImportError as error:
        return None, f"its extension can't be loaded: {error} ({REINSTALL})"


extension, unavailable_reason = _load()

if extension is None:
    warnings.warn(
        "fastnn runs on its slower reference implementation in plain PyTorch: "
        f"{unavailable_reason}.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _operators.register()


def is_tracing() -> bool:
    """Whether torch.jit.trace, or the ONNX exporter built on it, is tracing."""
    return not is_compiling() and tracing_state() is not None


def operators() -> Any:
    """The namespace of the operators: the extension, torch.ops.fastnn or the reference."""
    # torch.compile, torch.export and torch.jit.trace need torch.ops.fastnn, which they know. It
    # boxes its arguments and so costs two to three times as much as the extension's own function.
    if is_compiling() or tracing_state() is not None:
        # An exporting program has imported it; importing it here would slow down every start.
        onnx = sys.modules.get("torch.onnx")
        if onnx is not None and onnx.is_in_onnx_export():
            return _operators.ONNX
        return reference if extension is None else torch.ops.fastnn
    return reference if extension is None else extension


def is_available() -> bool:
    """Whether the built extension runs the operators (plain PyTorch does otherwise).

    >>> import fastnn
    >>> isinstance(fastnn.is_available(), bool)
    True
    """
    return extension is not None
