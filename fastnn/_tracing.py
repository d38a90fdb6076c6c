"""Looks into ``forward`` methods with torch.fx, for the ReLU calls that follow a Linear's.

``rewrite`` gives a module the forward of its trace, less the ReLUs behind each ``LinearReLU``: by a
class made for it, a subclass of its own, so that it stays the same object. Copies and pickles hold
the class it had, and are rewritten when they are made.

A trace keeps tensor operations and calls of modules and no more: contexts, decorators, branches,
side effects and the values of attributes are lost or fixed. So only a forward is traced whose
source consists of what a trace keeps.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fastnn import _torch, nn

RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")


def is_plain_relu(module: torch.nn.Module) -> bool:
    """Whether a module is a ReLU that nobody looks at: no hooks, no forward of its own."""
    return (
        type(module) is torch.nn.ReLU
        and not is_observed(module, inputs=True)
        and not is_patched(module)
    )


def is_observed(module: torch.nn.Module, inputs: bool) -> bool:
    """Whether hooks see what a module returns, or, if asked for, what it gets."""
    return _torch.has_hooks(module, inputs)


def is_patched(module: torch.nn.Module) -> bool:
    """Whether a module has a forward of its own, beside its class's."""
    return "forward" in vars(module)


class Untraceable(Exception):
    """A module's forward can't be replaced by its trace; the message ends "forward, which ..."."""


def relu_calls(module: torch.nn.Module) -> list[tuple[str, str | None]]:
    """Finds the Linear layers that a module's forward calls, each with the ReLU after it.

    Returns: for each call the layer's path from the module, and the name of the node of a ReLU
    that alone takes its output, or None.
    Errors: :class:`Untraceable`, with the reason.
    """
    graph = _trace(module)
    calls = []
    for node in graph.nodes:
        if _is_call_of(node, module, torch.nn.Linear):
            relu = next(iter(node.users), None) if len(node.users) == 1 else None
            found = relu is not None and _is_relu(relu, module)
            calls.append((node.target, relu.name if found else None))
    return calls


def runs_in_parts(module: torch.nn.Module, child: str) -> bool:
    """Whether a module's forward does anything with a child but call it, as far as its source says:
    ``self.child[0](x)``, ``for layer in self.child``."""
    function = _definition(type(module).forward)
    if function is None or not function.args.args:
        return False
    this = function.args.args[0].arg
    called = {id(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    return any(
        isinstance(node, ast.Attribute)
        and (node.attr, getattr(node.value, "id", None)) == (child, this)
        and id(node) not in called
        for node in ast.walk(function)
    )


def rewrite(module: torch.nn.Module) -> None:
    """Takes the ReLUs behind each LinearReLU out of a module's forward."""
    stock = _stock_class(module)
    module.__class__ = stock
    graph = _trace(module)
    for node in list(graph.nodes):
        if _is_relu(node, module) and _is_call_of(node.args[0], module, nn.LinearReLU):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    forward = type(fx.GraphModule(module, graph)).forward
    module.__class__ = type(f"Fused{stock.__name__}", (_Rewritten, stock), {"forward": forward})


def restore(module: torch.nn.Module) -> None:
    """Gives a rewritten module the class it had."""
    module.__class__ = _stock_class(module)


# ---- the class of a rewritten module -------------------------------------------------------------


class _Rewritten:
    """Beside a module's own class: how it is copied, pickled and made anew."""

    def __new__(cls, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # Of the class that the program wrote: a new module's Linear layers have no ReLU in them.
        return _stock_class_of(cls)(*args, **kwargs)

    def __init_subclass__(cls) -> None:
        """Not the program's own: this is no class of the program's."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(2)
        return _to_be_rewritten, (_stock_class(self),), *state

    def __setstate__(self, state):
        super().__setstate__(state)
        # Where the source isn't there, the forward as it was written does the same: a ReLU more.
        with suppress(Untraceable):
            rewrite(self)


def _to_be_rewritten(stock: type) -> torch.nn.Module:
    """An object without attributes yet, which its state will rewrite."""
    return object.__new__(type(f"Fused{stock.__name__}", (_Rewritten, stock), {}))


def _stock_class(module: torch.nn.Module) -> type:
    return _stock_class_of(type(module))


def _stock_class_of(kind: type) -> type:
    return kind.__bases__[1] if issubclass(kind, _Rewritten) else kind


def is_rewritten(module: torch.nn.Module) -> bool:
    """Whether a module has the forward of its trace."""
    return isinstance(module, _Rewritten)


# ---- tracing -------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Records a module's own forward; what its children do is theirs."""

    # In-place changes of buffers are recorded too; otherwise they would be made while tracing.
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: torch.nn.Module, path: str) -> bool:
        return True


def _trace(module: torch.nn.Module) -> fx.Graph:
    """Traces a forward, if a trace shows all that it does."""
    _check_signature(module)
    _Source(module).check()
    before = dict(vars(module))
    try:
        graph = _Tracer().trace(module)
        constants = vars(module).keys() - before.keys()
    except Exception as error:
        message = next(iter(str(error).splitlines()), "")
        raise Untraceable(f"torch.fx can't trace ({type(error).__name__}: {message})") from error
    finally:
        vars(module).clear()
        vars(module).update(before)
    if constants:
        raise Untraceable("makes tensors that don't depend on its input")
    return graph


def _check_signature(module: torch.nn.Module) -> None:
    if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
        raise Untraceable("is compiled already")
    if type(module).__module__.startswith("torch.nn."):
        raise Untraceable("is PyTorch's own")
    if is_patched(module):
        raise Untraceable("has been replaced")
    for parameter in inspect.signature(module.forward).parameters.values():
        plain = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not plain or parameter.default is not parameter.empty:
            raise Untraceable(f"has an optional argument, {parameter.name}")


def _definition(function: Any) -> ast.FunctionDef | None:
    """A function's syntax, if its source is there."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return definition if isinstance(definition, ast.FunctionDef) else None


def _has_its_source(function: FunctionType) -> bool:
    """Whether a file still has what a function was compiled from when it was imported."""
    own = function.__code__
    try:
        lines, _ = inspect.findsource(function)
        compiled = compile("".join(lines), own.co_filename, "exec", dont_inherit=True)
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    return any(
        (code.co_firstlineno, code.co_code, code.co_names, code.co_varnames)
        == (own.co_firstlineno, own.co_code, own.co_names, own.co_varnames)
        for code in _codes_in(compiled)
    )


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes_in(constant)


class _Source:
    """The source of a module's forward, held against what a trace keeps."""

    # Of expressions: names, attributes and calls are looked at more closely.
    _STATEMENTS = (
        *(ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.For, ast.Pass),
    )
    _EXPRESSIONS = (
        *(ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Subscript),
        *(ast.Slice, ast.Tuple, ast.List, ast.Dict, ast.Starred, ast.keyword),
    )
    _OTHERS = (ast.operator, ast.unaryop, ast.expr_context)

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        function = type(module).forward
        self._globals = getattr(function, "__globals__", {})
        if not inspect.isfunction(function) or function.__closure__:
            raise Untraceable("is no plain function")
        definition = _definition(function)
        if definition is None or not _has_its_source(function):
            raise Untraceable("has no source to be read")
        self._function = definition
        if self._function.decorator_list:
            raise Untraceable("has a decorator")
        arguments = [argument.arg for argument in self._function.args.args]
        self._self, self._locals = arguments[0], set(arguments[1:])
        # Names that a loop over modules gives to each.
        self._modules: set[str] = set()

    def check(self) -> None:
        """Raises :class:`Untraceable` unless a trace keeps all that the function does."""
        for statement in self._function.body:
            self._check_statement(statement)

    def _refuse(self, node: ast.AST) -> None:
        raise Untraceable(f"does what a trace loses, or fixes: {ast.unparse(node).splitlines()[0]}")

    def _check_statement(self, node: ast.stmt) -> None:
        if not isinstance(node, self._STATEMENTS):
            self._refuse(node)
        if isinstance(node, ast.For):
            self._check_loop(node)
            return
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        for target in filter(None, targets):
            self._bind(target)
        if getattr(node, "value", None) is not None:
            self._check_expression(node.value)

    def _check_loop(self, node: ast.For) -> None:
        """Only over modules, as their number is the module's own."""
        modules = self._held(node.iter)
        if not isinstance(modules, (torch.nn.ModuleList, torch.nn.Sequential)) or node.orelse:
            self._refuse(node)
        if not isinstance(node.target, ast.Name):
            self._refuse(node)
        self._modules.add(node.target.id)
        for statement in node.body:
            self._check_statement(statement)

    def _bind(self, target: ast.expr) -> None:
        """A local variable gets a value, of a trace's own."""
        for name in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(name, ast.Name):
                self._refuse(target)
            self._locals.add(name.id)
            self._modules.discard(name.id)

    def _check_expression(self, node: ast.AST) -> None:
        if not isinstance(node, (*self._EXPRESSIONS, *self._OTHERS)):
            self._refuse(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._refuse(node)
        if isinstance(node, ast.Call):
            self._check_function(node.func)
            for argument in (*node.args, *node.keywords):
                self._check_expression(argument)
        elif isinstance(node, ast.Name):
            if node.id not in self._locals:
                self._refuse(node)
        elif isinstance(node, ast.Attribute):
            # A parameter or a buffer; or an attribute of a local variable, which is a trace's own.
            if not isinstance(self._held(node), torch.Tensor):
                self._check_expression(node.value)
        else:
            for child in ast.iter_child_nodes(node):
                self._check_expression(child)

    def _check_function(self, node: ast.expr) -> None:
        """A module, a function of tensors, or a method of a local variable."""
        if isinstance(node, ast.Name) and node.id in self._modules:
            return
        if isinstance(self._held(node), torch.nn.Module) or self._is_tensor_function(node):
            return
        if not isinstance(node, ast.Attribute) or self._global(node) is not None:
            self._refuse(node)
        self._check_expression(node.value)

    def _held(self, node: ast.expr) -> Any:
        """What an expression as ``self.layers[0].weight`` stands for; None for others."""
        if isinstance(node, ast.Name) and node.id == self._self:
            return self._module
        if isinstance(node, ast.Attribute):
            holder = self._held(node.value)
            return getattr(holder, node.attr, None) if isinstance(holder, torch.nn.Module) else None
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            holder = self._held(node.value)
            containers = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
            return holder[node.slice.value] if isinstance(holder, containers) else None
        return None

    def _is_tensor_function(self, node: ast.expr) -> bool:
        """Whether it is one of torch's functions of tensors, of which none looks at other state."""
        function = self._global(node)
        name = node.attr if isinstance(node, ast.Attribute) else getattr(function, "__name__", "")
        return function is not None and (
            function is getattr(_torch.tensor_functions, name, None)
            or (function is getattr(F, name, None) and "dropout" not in name)
        )

    def _global(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return None if node.id in self._locals else self._globals.get(node.id)
        holder = self._global(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(holder, node.attr, None) if isinstance(holder, ModuleType) else None


def _is_call_of(node: object, module: torch.nn.Module, kind: type) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(module.get_submodule(node.target), kind)
    )


def _is_relu(node: fx.Node, module: torch.nn.Module) -> bool:
    """Whether a node is a ReLU that can be taken out; its one tensor is its first argument."""
    if not node.args:
        return False
    if node.op == "call_module":
        return is_plain_relu(module.get_submodule(node.target))
    functions = RELU_FUNCTIONS if node.op == "call_function" else _RELU_METHODS
    return node.op in ("call_function", "call_method") and node.target in functions
