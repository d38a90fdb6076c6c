"""Programs that build a model, change it and run it, before and after ``fuse``."""

from __future__ import annotations

import re

from hypothesis import strategies as st

from .program import Program, attempt, indented

PAIR = "nn.Linear(4, 4), nn.ReLU()"
LAYERS = [
    *[PAIR] * 6,
    "nn.Linear(4, 4), nn.ReLU(inplace=True)",
    "nn.Linear(4, 4)",
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.Linear(4, 4, bias=False), nn.ReLU()",
    "nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU()",
    "nn.Identity()",
    "nn.Flatten()",
    "nn.Dropout(0.5)",
    "Plain(4, 4), nn.ReLU()",
    "Doubled(4, 4), nn.ReLU()",
    "shared",
    "activation",
]
# These round even on small integers. Their eps keeps them from dividing by small deviations, which
# would amplify earlier rounding errors.
INEXACT_LAYERS = [
    "nn.BatchNorm1d(4, eps=1)",
    "nn.LayerNorm(4, eps=1)",
    "nn.GELU()",
    "nn.LogSoftmax(dim=-1)",
]
ROWS = ["nn.Sequential({})"] * 3 + ["named({})", "Chain({})", "Residual({})", "Loop({})"]
# Statements of a forward. Its parts are two Sequentials, lists of pairs, a dict of Sequentials, and
# two layers that other parts contain too.
FORWARD = [
    "x = self.first(x)",
    "x = self.second(x)",
    "x = self.first(x) + x",
    "x = self.first[0](x)",
    "x = self.first[1](self.first[0](x) + x)",
    "x = F.relu(self.first[0](x))",
    "x = self.by_parts(self.first, x)",
    "x = self.first[:2](x)",
    "x = self.first[-1](x)",
    "for layer in self.second:\n    x = layer(x)",
    "x = getattr(self, 'first').get_submodule('0')(x)",
    "x = checkpoint(self.first, x, use_reentrant=False)",
    "for block in self.blocks:\n    x = block(x)",
    "for block in self.blocks:\n    x = block[1](block[0](x) + x)",
    "for linear, relu in self.pairs:\n    x = relu(linear(x))",
    "x = self.blocks[0](x)",
    "x = self.heads['a'](x)",
    "for head in self.heads.values():\n    x = head(x)",
    "x = self.relu(self.linear(x))",
    "x = self.linear(x)",
]

# In the steps below ANY, LINEAR and ROW stand for a part of the model, LAYER for a new one.
HOOKS = [
    "ANY.register_forward_hook(lambda m, args, output: see('hook', output))",
    "ANY.register_forward_hook(lambda m, args, output: output * 2)",
    "ANY.register_forward_pre_hook(lambda m, args: see('pre hook', args))",
    "ANY.register_forward_pre_hook(lambda m, args: (args[0] * 2,))",
    "ANY.register_full_backward_hook(lambda m, *grads: see('backward hook', grads))",
    "ANY.register_full_backward_pre_hook(lambda m, grads: see('backward pre hook', grads))",
    "ANY._forward_hooks.clear()",
    "hook = lambda m, args, output: see('global hook', output)\n"
    "with nn.modules.module.register_module_forward_hook(hook):\n    train(see, model, x)",
    "hook = lambda m, *grads: see('global hook', grads)\n"
    "with nn.modules.module.register_module_full_backward_hook(hook):\n    train(see, model, x)",
]
FUSE = ["model = fuse(model)", "model = fuse(model, inplace=True)"]
CHANGES = [
    *FUSE,
    "model = unfuse(model)",
    "model = unfuse(model, inplace=True)",
    "model.eval()",
    "model.train()",
    "ANY.eval()",
    "ANY.requires_grad_(False)",
    "ROW[INDEX] = made(LAYER, dtype)",
    "row = ROW\nrow[INDEX] = made(Adapted(row[INDEX]), dtype)",
    "ROW.append(made(LAYER, dtype))",
    "ROW.insert(INDEX, made(LAYER, dtype))",
    "ROW.extend([made(LAYER, dtype), nn.ReLU()])",
    "ROW.pop(INDEX)",
    "del ROW[INDEX]",
    "model = ROW[INDEX:]",
    "LINEAR.forward = torch.sin",
    "LINEAR.weight.data.mul_(2)",
    "LINEAR.bias = None",
    "linear = LINEAR\nlinear.weight = nn.Parameter(linear.weight.detach() * 2)",
    "prune.l1_unstructured(LINEAR, 'weight', 0.5)",
    "model = copy.deepcopy(model)",
    "model = pickle.loads(pickle.dumps(model))",
    "model.load_state_dict(copy.deepcopy(model.state_dict()))",
    "model, x, dtype = model.double(), x.detach().double().requires_grad_(), torch.float64",
]
INEXACT_CHANGES = [
    "nn.utils.parametrizations.weight_norm(LINEAR)",
    "nn.utils.parametrizations.orthogonal(LINEAR)",
]
RUNS = [
    "train(see, model, x)",
    "see('output', model(x))",
    "with torch.no_grad():\n    see('output', model(x))",
    "with torch.inference_mode():\n    see('output', model(x))",
    "see('part', ANY(x))",
    "see('row', ROW[:INDEX](x))",
    "see('batches', model(x[None]))",
    "see('one', model(x[0]))",
    "see('none', model(x[:0]))",
    "with torch.autocast('cpu', torch.bfloat16):\n    train(see, model, x)",
    "state = {name: value * 2 for name, value in model.named_parameters()}\n"
    "see('functional', torch.func.functional_call(model, state, (x,)))",
    "output = checkpoint(model, x, use_reentrant=False)\n"
    "see('checkpoint', torch.autograd.grad(output, x, ramp(output)))",
    "output, weight = model(x), LINEAR.weight\n"
    "with torch.no_grad():\n    weight.add_(1)\n"
    "see('after a step', torch.autograd.grad(output, x, ramp(output)))",
    "output = model(x)\n"
    "first = torch.autograd.grad(output, x, ramp(output), create_graph=True)\n"
    "see('second', torch.autograd.grad(first, [*model.parameters()], ramp(x), allow_unused=True))",
    "look_at(see, model)",
]
# Not in a program with hooks, which would keep these transforms' internal values.
TRANSFORMS = [
    "see('vmap', torch.func.vmap(model, randomness='same')(torch.stack([x, x * 2]).detach()))",
    "see('jvp', torch.func.jvp(model, (x.detach(),), (ramp(x),)))",
    "see('grad', torch.func.grad(lambda x: model(x).sum())(x.detach()))",
    "see('traced', torch.fx.symbolic_trace(model)(x))",
]
COMPILE = ["torch.compiler.reset()\nsee('compiled', torch.compile(model, backend='BACKEND')(x))"]

PART = st.integers(0, 9)
WORDS = {
    "ANY": PART.map("nth(model, {})".format),
    "LINEAR": PART.map("nth(model, {}, nn.Linear)".format),
    "ROW": PART.map("nth(model, {}, nn.Sequential)".format),
    "INDEX": st.integers(-1, 1).map(str),
    "LAYER": st.sampled_from(["nn.Linear(4, 4)", "nn.ReLU()", "Doubled(4, 4)", f"named({PAIR})"]),
    "BACKEND": st.sampled_from(["eager", "aot_eager"]),
}


SHARED = "shared, activation = nn.Linear(4, 4), nn.ReLU()"


@st.composite
def programs(draw: st.DrawFn) -> Program:
    dtype = draw(st.sampled_from(["float64", "float64", "float32", "bfloat16", "float16"]))
    is_exact = dtype != "float64"
    classes, model = draw(models(LAYERS + INEXACT_LAYERS * (not is_exact)))
    changes = CHANGES + INEXACT_CHANGES * (not is_exact)
    # Compiling takes longer than ten other programs.
    special = draw(st.sampled_from([HOOKS, TRANSFORMS] * 20 + [COMPILE]))
    step = st.sampled_from([changes, RUNS, special]).flatmap(st.sampled_from)
    before, after = st.lists(step, max_size=3), st.lists(step, min_size=1, max_size=6)
    history = [*draw(before), draw(st.sampled_from(FUSE)), *draw(after)]
    body = [
        "torch.manual_seed(0)",
        f"dtype = torch.{dtype}",
        SHARED,
        f"model = made({model}, dtype)",
        "parameters = list(model.parameters())",
        f"x = torch.{'randint(-1, 2, (3, 4))' if is_exact else 'randn(3, 4)'}.to(dtype)",
        "x.requires_grad_()",
        *(attempt(with_words(draw, text)) for text in history),
        attempt("train(see, model, x)"),
        "look_at(see, model)",
        "see('kept', [any(p is q for q in parameters) for p in model.parameters()])",
    ]
    text = f"{classes}def program(see, fuse, unfuse):\n{indented(*body)}"
    return Program(text, {"stock": "untouched, untouched", "ours": "fastnn.fuse, fastnn.unfuse"})


def with_words(draw: st.DrawFn, step: str) -> str:
    return re.sub(rf"\b({'|'.join(WORDS)})\b", lambda match: draw(WORDS[match[0]]), step)


@st.composite
def models(draw: st.DrawFn, layers: list[str]) -> tuple[str, str]:
    """The class of a model, if it has one, and the expression that makes it."""
    row = rows(st.recursive(st.sampled_from(layers), rows, max_leaves=6))
    if draw(st.booleans()):
        return "", draw(row)
    forward = "\n".join(draw(st.lists(st.sampled_from(FORWARD), min_size=1, max_size=4)))
    parts = {
        "linear": "shared",
        "relu": "activation",
        "first": draw(row),
        "second": draw(row),
        "blocks": f"nn.ModuleList([nn.Sequential({PAIR}) for _ in range(2)])",
        "pairs": f"nn.ModuleList([nn.ModuleList([{PAIR}]) for _ in range(2)])",
        "heads": f"nn.ModuleDict({{'a': {draw(row)}, 'b': {draw(row)}}})",
    }
    lines = [f"self.{name} = {part}" for name, part in parts.items() if name in forward]
    methods = [
        method("__init__(self)", "super().__init__()", SHARED, *lines),
        method("by_parts(self, row, x)", "return row[0](x) + x"),
        method("forward(self, x)", forward, "return x"),
    ]
    methods = [text for text in methods if "by_parts" not in text or "by_parts" in forward]
    return "class Net(nn.Module):\n" + "\n\n".join(methods) + "\n\n\n", "Net()"


def method(signature: str, *lines: str) -> str:
    return indented(f"def {signature}:", indented(*lines))


def rows(layers: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Sequentials of the layers; seldom empty, as most steps take the first layer."""
    inner = st.lists(layers, min_size=1, max_size=4) | st.lists(layers, max_size=4)
    return st.builds(
        lambda kind, layers: kind.format(", ".join(layers)), st.sampled_from(ROWS), inner
    )
