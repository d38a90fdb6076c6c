"""Programs that train a few odd tensors: the history of an optimizer, step by step."""

from __future__ import annotations

from hypothesis import strategies as st

from .program import Program, indented

PARAMETERS = [
    "torch.randn(3)",
    "torch.randn(2, 3, dtype=torch.float64)",
    "torch.randn(3).bfloat16()",
    "torch.randn(3).half()",
    "torch.randn(17, 5)",
    "torch.randn(())",
    "torch.randn(0)",
    "torch.randn(3, 2).t()",
    "torch.randn(3, 4)[:, ::2]",
    "torch.randn(1).expand(3)",
    "torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)",
    "torch.randn(2, dtype=torch.complex64)",
    "torch.randn(2, dtype=torch.complex64).conj().imag",
    "torch._lazy_clone(torch.randn(3))",
]
# For a parameter p.
GRADIENTS = [
    "torch.randn_like(p)",
    "torch.randn(p.shape, dtype=p.dtype)",
    "None",
    "torch.zeros_like(p)",
    "torch.ones((), dtype=p.dtype).expand_as(p)",
    "laid_out(torch.randn_like(p), 'offset')",
    "torch.randn_like(p).to_sparse()",
    "torch._neg_view(torch.randn_like(p))",
    "torch._lazy_clone(torch.randn_like(p))",
    "torch.full_like(p, float('inf'))",
    "torch.randn_like(p).requires_grad_()",
]
NUMBERS = [0, 0.5, 0.9, 1]
OPTIONS = {
    "lr": [0.1, 0.5, 0, 1, "torch.tensor(0.1)", "torch.tensor([0.1])"],
    "momentum": NUMBERS,
    "dampening": NUMBERS,
    "weight_decay": [*NUMBERS, "torch.tensor(0.5)"],
    "nesterov": [False, True],
    "maximize": [True, False],
    "foreach": [True, False],
    "fused": [True, False],
    "differentiable": [True],
}
IN_GROUPS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
SCHEDULERS = [
    "torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)",
    "torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)",
    "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)",
]
LOSS = "sum((p * p).sum().abs() for p in parameters)"
COPIED = "parameters = [p for group in optimizer.param_groups for p in group['params']]"
STEPS = [
    "optimizer.step()",
    "optimizer.zero_grad()",
    "optimizer.zero_grad(set_to_none=False)",
    "see('loss', optimizer.step(closure))",
    "see('loss', optimizer.step(closure=closure))",
    "see('loss', optimizer.step(lambda: 3.0))",
    f"{LOSS}.backward()",
    "nn.utils.clip_grad_norm_(parameters[:1], 0.5)",
    "nn.utils.clip_grad_value_(parameters, 0.5)",
    f"scaler.scale({LOSS}).backward()\nscaler.step(optimizer)\nscaler.update()",
    f"scaler.scale({LOSS}).backward()\nscaler.unscale_(optimizer)\n"
    "scaler.step(optimizer)\nscaler.update()",
    "optimizer.add_param_group({'params': [nn.Parameter(torch.ones(2))]})",
    "optimizer.add_param_group({'params': parameters[:1]})",
    "other = torch.optim.SGD([{'params': group['params']} for group in optimizer.param_groups])\n"
    "other.load_state_dict(optimizer.state_dict())\n"
    "optimizer.load_state_dict(other.state_dict())",
    "optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))",
    f"optimizer = copy.deepcopy(optimizer)\n{COPIED}",
    f"optimizer = pickle.loads(pickle.dumps(optimizer))\n{COPIED}",
    "optimizer = take_over(optimizer)",
    "scheduler.step()",
    "optimizer.state.clear()",
    "p = parameters[0]\np.grad_dtype = None\np.grad = torch.randn_like(p).double()",
    "optimizer.param_groups[0]['params'] = tuple(optimizer.param_groups[0]['params'])",
    "hook = lambda o, args, kwargs: see('before', [len(args), list(kwargs)])\n"
    "optimizer.register_step_pre_hook(hook)",
    "hook = lambda o, args, kwargs: see('after', [len(args), list(kwargs)])\n"
    "optimizer.register_step_post_hook(hook)",
    "hook = lambda o, args, kwargs: (args, {'closure': closure})\n"
    "optimizer.register_step_pre_hook(hook)",
]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    made = draw(st.lists(st.sampled_from(PARAMETERS), min_size=1, max_size=4))
    names = [f"p{i}" for i in range(len(made))]
    cut = draw(st.integers(0, len(names)))
    groups = ", ".join(group(draw, part) for part in (names[:cut], names[cut:]) if part)
    arguments = [f"[{groups}]", *(f"{n}={v}" for n, v in drawn(draw, OPTIONS).items())]
    class_ = draw(st.sampled_from(["SGD", "SGD", "SGD", "take_over(torch.optim.SGD"]))
    steps = [step(draw, len(names)) for _ in range(draw(st.integers(1, 6)))]
    body = [
        "torch.manual_seed(0)",
        *(f"{n} = nn.Parameter({tensor})" for n, tensor in zip(names, made, strict=True)),
        f"parameters = [{', '.join(names)}]",
        f"optimizer = {class_}({', '.join(arguments)}){')' * class_.count('(')}",
    ]
    text = "\n".join(steps)
    if "closure" in text:
        body += ["def closure():", indented(f"loss = {LOSS}", "loss.backward()", "return 'loss'")]
    if "scaler" in text:
        body.append("scaler = torch.amp.GradScaler('cpu', init_scale=4.0)")
    if "scheduler" in text:
        body.append(f"scheduler = {draw(st.sampled_from(SCHEDULERS))}")
    for lines in steps:
        body += [lines, "see('parameters', parameters)"]
    body.append("see('state', optimizer.state_dict())")
    text = f"def program(see, SGD, take_over):\n{indented(*body)}"
    sides = {
        "stock": "torch.optim.SGD, as_is",
        "ours": "fastnn.optim.SGD, fastnn.optim.SGD.from_torch",
    }
    return Program(text, sides)


def drawn(draw: st.DrawFn, table: dict[str, list]) -> dict[str, object]:
    """Values for some of the options."""
    names = draw(st.lists(st.sampled_from(list(table)), unique=True, max_size=4))
    return {name: draw(st.sampled_from(table[name])) for name in names}


def group(draw: st.DrawFn, names: list[str]) -> str:
    table = {name: OPTIONS[name] for name in IN_GROUPS}
    chosen = drawn(draw, table) if draw(st.booleans()) else {}
    pairs = "".join(f", '{name}': {value}" for name, value in chosen.items())
    return f"{{'params': [{', '.join(names)}]{pairs}}}"


def step(draw: st.DrawFn, count: int) -> str:
    """A step of the history; half of them train, as programs do."""
    kind = draw(st.integers(0, 5))
    if kind < 3:
        return "for p in parameters:\n    p.grad = torch.randn_like(p)\noptimizer.step()"
    if kind == 3:
        gradient = draw(st.sampled_from(GRADIENTS))
        return f"p = parameters[{draw(st.integers(0, count - 1))}]\np.grad = {gradient}"
    return draw(st.sampled_from(STEPS))
