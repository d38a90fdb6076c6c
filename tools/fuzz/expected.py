"""The intended differences, and torch's own faults."""

from __future__ import annotations

import re

from .program import Program

# Patterns of the program (it starts with our function, such as fastnn.functional.linear_relu) and
# of the difference, and the reason; docs/numerics.md lists those on purpose.
EXPECTED = [
    (
        r"prune",
        "TypeError 'model: can't be copied",
        "fuse copies, which torch can't do with such a model either",
    ),
    (
        r"uint8\)",
        "^error: (?!RuntimeError)",
        "uint8 targets are taken for every shape and under transforms; torch refuses some",
    ),
    (
        r"int32\)(?s:.*)torch\.func",
        "expected target dtype .*, not",
        "torch's transforms don't look at the dtype of targets",
    ),
    (
        r"label_smoothing=(-0.1|float\('nan'\))",
        "label_smoothing must be",
        "torch accepts a bad label_smoothing",
    ),
    (
        r"ignore_index(?s:.*)(inf|nan|finfo)|(inf|nan|finfo)(?s:.*)ignore_index",
        "values$",
        "a row whose target is ignored has a gradient of zero, whatever its logits",
    ),
    (
        r"torch\.func|autograd\.grad",
        "IndexError 'Target .* is out of bounds: .*, not RuntimeError",
        "torch's own error comes from one of its operators, not from the loss",
    ),
    (
        "laid_out",
        "not RuntimeError 'grad_input must be contiguous'",
        "torch has no gradient of such logits",
    ),
    (
        "fused=True",
        "error: RuntimeError .*, not NotImplementedError '\"fused_sgd_kernel",
        "torch refuses a complex parameter when it has stepped those before it",
    ),
    (
        r"(?s)^(?=.*fused=True)(?=.*(::2|imag|expand|\.t\(\)|channels_last|_neg_view))",
        "values$|expected each element",
        "torch's fused step assumes that tensors are contiguous",
    ),
    (
        r"foreach=True(?s:.*)(imag|_neg_view)|(imag|_neg_view)(?s:.*)foreach=True",
        "not RuntimeError ' fallback doesn't currently support mutable TensorLists",
        "torch's foreach step refuses negated tensors",
    ),
    (
        r"(?s)^(?=.*foreach=True)(?=.*(nesterov=|nesterov': )True)",
        "values$",
        "torch's foreach step with Nesterov momentum changes the gradients",
    ),
    (
        r"^fastnn\.functional\.linear(_relu)?,(?s:.*)laid_out(?s:.*)logits",
        "gradients.*(values$|RuntimeError 'one of the variables)",
        "torch multiplies a copy of such an input, and keeps that",
    ),
    (
        r"(?s)^fastnn\.functional\.linear(_relu)?,(?=.*\.(max|min)\b)(?=.*('-?inf'|\.(max|min).*\.(max|min)))",
        "values$",
        "a product with the largest number overflows by itself, but not in a fused multiply-add: "
        "next to another such term or an infinity the sum depends on its order",
    ),
    (
        r"(?s)^fastnn\.(functional\.linear_cross|nn\.LinearCross).*logits\.data\.mul_",
        "gradients.*values$",
        "without a reduction the backward computes the logits once more, from the input as it is",
    ),
    (
        r"(?s)^fastnn\.(functional\.linear_cross|nn\.LinearCross)",
        "RuntimeError 'one of the variables .*, not gradients",
        "input and weight are kept for derivatives of higher orders, a frozen one too",
    ),
]


def is_expected(program: Program, difference: str) -> bool:
    text = f"{program.sides['ours']}\n{program.body}"
    return any(re.search(has, text) and re.search(seen, difference) for has, seen, _ in EXPECTED)
