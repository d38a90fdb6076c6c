"""Programs that call an operator, as a function or by its module, and take gradients of it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from hypothesis import strategies as st

from fastnn._operators import OPERATORS

from .program import Program, attempt, indented

FUNCTIONS = [operator.name for operator in OPERATORS]
# (A module with its own parameters doesn't take the function's arguments.)
MODULES = {
    operator.name: operator.module
    for operator in OPERATORS
    if operator.stock_module and operator.name != "linear_cross_entropy"
}

DTYPES = [f"torch.{name}" for name in ("float64", "float32", "bfloat16", "float16")]
SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 33, 0])
MOST = 300  # elements, whose Hessian is small enough
EXTREMES = ["float('inf')", "-float('inf')", "float('nan')", "-0.0", "1e4", "-1e4"]
EXTREMES += [f"torch.finfo(dtype).{name}" for name in ("max", "min", "tiny")]

BACKWARD = """\
value.backward(ramp(value))
see("gradients", [leaf.grad for leaf in leaves])"""
# Uses of call(input), which runs the operator.
USES = [
    f"""\
value = call(input)
see("value", value)
{BACKWARD}""",
    """\
with torch.no_grad():
    see("value", call(input))""",
    """\
with torch.inference_mode():
    see("value", call(input))""",
    f"""\
value = call(input)
value.backward(ramp(value), retain_graph=True)
{BACKWARD}""",
    f"""\
logits = input + 0
value = call(logits)
logits.data.mul_(2)
{BACKWARD}""",
    f"""\
logits = input + 0
value = call(logits)
with torch.no_grad():
    logits.mul_(2)
{BACKWARD}""",
    f"""\
value = call(input)
with torch.no_grad():
    leaves[-1].mul_(2)
{BACKWARD}""",
    f"""\
with torch.autocast("cpu", torch.bfloat16):
    value = call(input)
see("value", value)
{BACKWARD}""",
    """\
value = call(input)
first = torch.autograd.grad(value, input, ramp(value), create_graph=True)
see("first", first)
see("second", torch.autograd.grad(first, input, ramp(input), allow_unused=True))""",
    'see("vmap", torch.func.vmap(call)(torch.stack([input, input * 2]).detach()))',
    'see("grad", torch.func.grad(lambda logits: call(logits).sum())(input.detach()))',
    'see("jvp", torch.func.jvp(call, (input.detach(),), (ramp(input),)))',
    'see("hessian", torch.func.hessian(lambda logits: call(logits).sum())(input.detach()))',
]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    name = draw(st.sampled_from(FUNCTIONS))
    lines, arguments, options = CALLS[name](draw, name)
    stock, ours = f"F.{name}" if hasattr(F, name) else name, f"fastnn.functional.{name}"
    call = f"operator({', '.join(['input', *arguments, *options])})"
    if name in MODULES and draw(st.booleans()):
        stock, ours = f"nn.{MODULES[name]}", f"fastnn.nn.{MODULES[name]}"
        call = f"operator({', '.join(options)})({', '.join(['input', *arguments])})"
    uses = draw(st.lists(st.sampled_from(USES), min_size=1, max_size=2))
    body = [
        "torch.manual_seed(0)",
        f"dtype = {draw(st.sampled_from(DTYPES))}",
        *lines,
        f"call = lambda input: {call}",
        *map(attempt, uses),
    ]
    text = f"def program(see, operator, cast):\n{indented(*body)}"
    exact = f"{stock}, Tensor.double"
    return Program(text, {"stock": f"{stock}, as_is", "ours": f"{ours}, as_is", "exact": exact})


# These draw the lines that make the tensors, the tensors after the input, and the options.
Call = tuple[list[str], list[str], list[str]]


def linear(draw: st.DrawFn, name: str) -> Call:
    features, outputs = draw(SIZES), draw(SIZES)
    tensors = {"input": (*draw(shapes(at_most=2)), features), "weight": (outputs, features)}
    if draw(st.booleans()):
        tensors["bias"] = (draw(st.sampled_from([outputs, outputs, outputs, 1])),)
    lines = [line for name, shape in tensors.items() for line in floats(draw, name, shape)]
    learned = [name for name in tensors if draw(st.integers(0, 4))]
    return [*lines, leaves(learned)], list(tensors)[1:], []


def log_softmax(draw: st.DrawFn, name: str) -> Call:
    shape = draw(shapes())
    dim = draw(st.integers(-len(shape) - 1, len(shape)) | st.none())
    return [*floats(draw, "input", shape), leaves(["input"])], [], [f"dim={dim}"]


def loss(draw: st.DrawFn, name: str) -> Call:
    classes, *rest = draw(shapes(at_least=1))
    classes = max(classes, 1)  # without classes torch's checks fail, each in its own way
    shape = (rest[0], classes, *rest[1:]) if rest else (classes,)
    learned, options = ["input"], {"reduction": draw(st.sampled_from(REDUCTIONS))}
    lines = floats(draw, "input", shape)
    if draw(st.booleans()):
        lines += floats(draw, "weight", (classes,), "rand")
        options["weight"] = "weight"
    if name == "cross_entropy":
        options["label_smoothing"] = draw(st.sampled_from(SMOOTHINGS))
    for legacy in ("size_average", "reduce"):
        options[legacy] = draw(st.sampled_from([None, None, None, None, True, False]))
    if name == "cross_entropy" and draw(st.booleans()):
        lines += floats(draw, "target", shape, "rand")
        learned += ["target"] * draw(st.booleans())
    else:
        ignored = draw(st.sampled_from([None, -100, 0, 1, classes]))
        options["ignore_index"] = ignored
        lines += indices(draw, rest, classes, ignored)
    options = {name: value for name, value in options.items() if value is not None}
    return [*lines, leaves(learned)], ["target"], [f"{n}={v}" for n, v in options.items()]


def linear_cross_entropy(draw: st.DrawFn, name: str) -> Call:
    rows = draw(shapes(at_most=1))
    features, classes = draw(SIZES), max(draw(SIZES), 1)
    options = {"reduction": draw(st.sampled_from(REDUCTIONS))}
    options["label_smoothing"] = draw(st.sampled_from(SMOOTHINGS))
    lines = floats(draw, "input", (*rows, features))
    lines += floats(draw, "linear_weight", (classes, features))
    learned = ["input", *["linear_weight"] * draw(st.booleans())]
    if draw(st.booleans()):
        lines += floats(draw, "linear_bias", (classes,))
        options["linear_bias"] = "linear_bias"
    if draw(st.booleans()):
        lines += floats(draw, "weight", (classes,), "rand")
        options["weight"] = "weight"
    if draw(st.booleans()):
        lines += floats(draw, "target", (*rows, classes), "rand")
    else:
        ignored = draw(st.sampled_from([None, -100, 0, 1, classes]))
        options["ignore_index"] = ignored
        lines += indices(draw, rows, classes, ignored)
    options = {name: value for name, value in options.items() if value is not None}
    tensors = ["linear_weight", "target"]
    return [*lines, leaves(learned)], tensors, [f"{n}={v}" for n, v in options.items()]


CALLS = {
    "linear": linear,
    "linear_relu": linear,
    "log_softmax": log_softmax,
    "nll_loss": loss,
    "cross_entropy": loss,
    "linear_cross_entropy": linear_cross_entropy,
}


def shapes(at_least: int = 0, at_most: int = 4) -> st.SearchStrategy[list[int]]:
    sizes = st.lists(SIZES, min_size=at_least, max_size=at_most)
    return sizes.filter(lambda shape: math.prod(shape) <= MOST)


REDUCTIONS = [None, "'none'", "'mean'", "'sum'"]
SMOOTHINGS = [None, None, 0.1, 1.0, 1.5, -0.1, "float('nan')"]


def indices(draw: st.DrawFn, shape: list[int], classes: int, ignored: int | None) -> list[str]:
    dtype = draw(st.sampled_from(["int64"] * 6 + ["uint8", "int32"]))
    lines = [f"target = torch.randint({classes}, {tuple(shape)}).to(torch.{dtype})"]
    odd = draw(st.sampled_from([None, ignored, ignored, classes, -1]))
    if odd is not None and 0 not in shape:
        lines.append(f"target.view(-1)[{draw(st.sampled_from([0, -1]))}] = {odd}")
    return [*lines, *laid_out(draw, "target", shape)]


def floats(draw: st.DrawFn, name: str, shape: tuple[int, ...], values: str = "randn") -> list[str]:
    """Lines that draw a floating-point tensor; some of randn's values become extreme."""
    lines = [f"{name} = torch.{values}({tuple(shape)}, dtype=torch.float64).to(dtype)"]
    if values == "randn" and 0 not in shape:
        for extreme in draw(st.lists(st.sampled_from(EXTREMES), max_size=2)):
            lines.append(f"{name}.view(-1)[{draw(st.sampled_from([0, -1]))}] = {extreme}")
    return [*lines, *laid_out(draw, name, shape), f"{name} = cast({name})"]


def laid_out(draw: st.DrawFn, name: str, shape: tuple[int, ...]) -> list[str]:
    names = [None, "reversed", "offset"] + ["sliced", "expanded"] * (len(shape) > 0)
    names += ["transposed"] * (len(shape) > 1) + ["channels_last"] * (len(shape) == 4)
    layout = draw(st.sampled_from(names))
    return [f"{name} = laid_out({name}, '{layout}')"] if layout else []


def leaves(names: list[str]) -> str:
    return f"leaves = [leaf.requires_grad_() for leaf in [{', '.join(names)}]]"
