"""PyTorch's private names: only fastnn/_torch.py uses them, and fastnn runs without them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import fastnn

pytestmark = pytest.mark.cpu_only("the Python sources")

PACKAGE = Path(fastnn.__file__).parent

# The names that fastnn/_torch.py looks up in PyTorch's modules, ...
FUNCTIONS = {
    "torch._C._EnableTorchFunction",
    "torch._C._is_torch_function_mode_enabled",
    "torch._C._len_torch_dispatch_stack",
    "torch.overrides._get_current_function_mode_stack",
    "torch._C._autograd._profiler_enabled",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._get_tracing_state",
    "torch._compile._disable_dynamo",
    "torch.nn._reduction.legacy_get_string",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.nn.functional._get_softmax_dim",
    "torch.optim.optimizer._device_dtype_check_for_fused",
    "torch.optim.optimizer._global_optimizer_post_hooks",
    "torch.optim.optimizer._global_optimizer_pre_hooks",
}
# ... classes that torch itself imports later, which can't be hidden temporarily, ...
CLASSES = {
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.functional_tensor.FunctionalTensor",
}
# ... and attributes of its objects.
OF_FORWARD_MODE = {"_current_level"}
OF_MODULES = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_buffers",
    "_call_impl",
    "_compiled_call_impl",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_modules",
    "_parameters",
}
OF_OPTIMIZERS = {"_opt_called", "_optimizer_step_post_hooks", "_optimizer_step_pre_hooks"}
OF_STEPS = {"_wrapped_by_lr_sched"}
OF_TENSORS = {"_backward_hooks", "_is_zerotensor", "_post_accumulate_grad_hooks"}
OF_TRANSFORMER_LAYERS = {"_ff_block"}


NAME_IN_A_STRING = r"_[a-z]\w*|torch(\.\w+)+"


# Public, and underscored so that they can't be the name of a field.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and name not in OF_NAMED_TUPLES


def attribute(node: ast.Attribute) -> str:
    """Its name, with "self" if it is an attribute of that: other objects may be PyTorch's."""
    is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
    return f"self.{node.attr}" if is_own else node.attr


def own_names(tree: ast.Module) -> Iterator[str]:
    """The names that a file defines, and assigns to its objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from {attribute(node)} - {node.attr}


def used_names(tree: ast.Module) -> Iterator[str]:
    """The names that a file imports, the attributes that it uses, and the names in its strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] != "fastnn":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield attribute(node)
        elif isinstance(node, ast.Constant) and re.fullmatch(NAME_IN_A_STRING, str(node.value)):
            yield node.value


def foreign_private_names(path: Path, own: set[str]) -> set[str]:
    return {
        name
        for name in used_names(ast.parse(path.read_text()))
        if name not in own and any(is_private(x) and x not in own for x in name.split("."))
    }


FILES = sorted(PACKAGE.rglob("*.py"))
OWN = {name for path in FILES for name in own_names(ast.parse(path.read_text()))}
OTHERS = [path for path in FILES if path.name != "_torch.py"]


def test_the_module_has_the_names_that_are_listed_here():
    of_objects = OF_FORWARD_MODE | OF_MODULES | OF_OPTIMIZERS | OF_STEPS | OF_TENSORS
    listed = FUNCTIONS | CLASSES | of_objects | OF_TRANSFORMER_LAYERS
    assert foreign_private_names(PACKAGE / "_torch.py", OWN) == listed


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_has_any(path):
    assert foreign_private_names(path, OWN) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from torch._C import _get_tracing_state",
        "import torch._dynamo",
        "from torch.nn import _reduction",
        "torch._C",
        "self._optimizer_step_pre_hooks",
        "step._wrapped_by_lr_sched = True",
        "getattr(torch.nn.functional, '_get_softmax_dim')",
        "import_module('torch._compile')",
    ],
)
def test_a_private_name_is_found(tmp_path, source):
    (tmp_path / "file.py").write_text(source)
    assert foreign_private_names(tmp_path / "file.py", OWN)


# --- in this PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FUNCTIONS | CLASSES))
def test_function_is_in_this_torch(name):
    """If it fails, the replacement serves: remove the name, or find the new one."""
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


def test_attributes_are_in_this_torch():
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.step()
    assert [name for name in OF_FORWARD_MODE if not hasattr(torch.autograd.forward_ad, name)] == []
    assert [name for name in OF_MODULES if not hasattr(module, name)] == []
    assert [name for name in OF_OPTIMIZERS if not hasattr(optimizer, name)] == []
    assert [name for name in OF_STEPS if not hasattr(optimizer.step, name)] == []
    assert [name for name in OF_TENSORS if not hasattr(torch.ones(1), name)] == []
    layers = (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
    assert all(hasattr(layer, name) for name in OF_TRANSFORMER_LAYERS for layer in layers)


# --- in a PyTorch without them --------------------------------------------------------------------

# Hidden while fastnn is imported; PyTorch itself needs them afterwards.
WITHOUT_FUNCTIONS = f"""
import warnings
from importlib import import_module

import torch

places = [(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in {FUNCTIONS}]
hidden = [vars(module).pop(name) for module, name in places]
warnings.simplefilter("ignore")
import fastnn
for (module, name), value in zip(places, hidden):
    setattr(module, name, value)

from torch.nn import functional as F

names = ["disable_dynamo", "legacy_reduction", "profiler_enabled", "softmax_dim", "tracing_state"]
assert all(getattr(fastnn._torch, name) not in hidden for name in names)

x, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
for shape in ((), (3,), (4, 3), (4, 3, 2), (1, 2, 3, 4)):
    input = torch.randn(shape)
    torch.testing.assert_close(fastnn.functional.log_softmax(input), F.log_softmax(input))
for size_average in (None, True, False):
    for reduce in (None, True, False):
        options = {{"size_average": size_average, "reduce": reduce}}
        torch.testing.assert_close(
            fastnn.functional.cross_entropy(x, target, **options),
            F.cross_entropy(x, target, **options),
        )

def train(make_optimizer):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    fastnn.fuse(model, inplace=True)
    optimizer = make_optimizer(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert called == [1, 1, 1]
    return list(model.parameters())

for ours, stock in zip(train(fastnn.optim.SGD), train(torch.optim.SGD)):
    torch.testing.assert_close(ours, stock)
torch.testing.assert_close(
    torch.jit.trace(lambda x: fastnn.functional.log_softmax(x, 1), x)(2 * x),
    F.log_softmax(2 * x, 1),
)
print("done")
"""


def test_fastnn_runs_without_the_functions():
    command = [sys.executable, "-c", WITHOUT_FUNCTIONS]
    process = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout) == (0, "done\n"), process.stderr


def test_without_their_attributes_all_is_taken_to_be_observed():
    class Bare:
        pass

    assert fastnn._torch.is_observed(Bare())
    assert fastnn._torch.is_step_observed(Bare())
    assert not fastnn._torch.has_scheduler_mark(Bare())
    assert not fastnn._torch.is_zero_tensor(Bare())
    assert fastnn._torch.has_tensor_hooks(Bare())
    assert fastnn._torch.has_step_hooks(Bare())


def test_without_its_level_forward_mode_is_taken_to_be_on(monkeypatch):
    assert not fastnn._torch.in_forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert fastnn._torch.in_forward_mode()
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    assert fastnn._torch.in_forward_mode()


def test_a_transformer_layer_without_its_method_is_left_as_it_is(monkeypatch):
    layer = torch.nn.TransformerEncoderLayer(4, 2, 4)
    assert len(fastnn.fusion_report(layer).fusible) == 1
    monkeypatch.delattr(torch.nn.TransformerEncoderLayer, "_ff_block")
    assert len(fastnn.fusion_report(layer).fusible) == 0
