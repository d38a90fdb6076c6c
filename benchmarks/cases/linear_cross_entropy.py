"""Linear and cross entropy of a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from benchmarks.case import (
    EXACT_ELEMENTS,
    Case,
    Compiled,
    Contender,
    Function,
    Inputs,
    Unavailable,
    Work,
    classes,
    normal,
)
from benchmarks.cases.classifiers import MODES
from benchmarks.cases.jax_process import JaxProcess
from benchmarks.device import CPU, CUDA

# Rows, features, vocabulary. Inductor's auto-chunker leaves the first whole: it takes the weight,
# with as many elements as the logits, for part of what has to be chunked. The others are language
# models', with logits many times as large as their weight.
SHAPES = ((256, 256, 32000), (2048, 512, 32000), (8192, 64, 50257))
# Chunk sizes of torch's fusion: large chunks are fastest here, small ones save memory. Its default
# options make chunks of 2 to 8 rows, which are several times slower.
CHUNK_ROWS = (64, 256, 1024)
# Numbers of chunks for inductor's auto-chunker: few are fastest, and 8 is the default.
AUTO_CHUNKS = (2, 8, 32)
# The logits, their log-softmax, their gradient, and what a compiler keeps beside.
PEAK_BYTES_PER_LOGIT = 20


def cases() -> list[Case]:
    return [_case(*shape, mode) for shape in SHAPES for mode in MODES]


# Rows, features, vocabulary, dtype, priority on a GPU: heads of language models; and one of few
# features, whose products are short.
CUDA_SIZES = (
    (8192, 4096, 32000, torch.bfloat16, 1),
    (4096, 2048, 128256, torch.bfloat16, 1),
    (8192, 512, 32000, torch.float32, 2),
)


def cuda_cases() -> list[Case]:
    return [
        replace(_case(*sizes, mode, dtype), priority=priority)
        for *sizes, dtype, priority in CUDA_SIZES
        for mode in MODES
    ]


def _case(
    rows: int, features: int, vocabulary: int, mode: str, dtype: torch.dtype = torch.float32
) -> Case:
    gradients = mode == "forward_backward"
    return Case(
        op="linear + cross_entropy",
        label=f"{rows}, {features}->{vocabulary}",
        dtype=dtype,
        mode=mode,
        inputs=partial(
            _features_weight_targets,
            rows=rows,
            features=features,
            vocabulary=vocabulary,
            dtype=dtype,
            gradients=gradients,
        ),
        contenders=partial(_contenders, gradients),
        reference=MeanOverRows("reference", _linear_then(F.cross_entropy)),
        work=Work(flops=(3 if gradients else 1) * 2.0 * rows * features * vocabulary),
        large=gradients,
        peak_bytes=PEAK_BYTES_PER_LOGIT * rows * vocabulary,
    )


def _features_weight_targets(
    generator: torch.Generator,
    rows: int,
    features: int,
    vocabulary: int,
    dtype: torch.dtype,
    gradients: bool,
) -> Inputs:
    hidden = normal(generator, rows, features, dtype=dtype)
    weight = normal(generator, vocabulary, features, dtype=dtype, scale=features**-0.5)
    return Inputs(
        (
            hidden.requires_grad_(gradients),
            weight.requires_grad_(gradients),
            classes(generator, vocabulary, rows),
        )
    )


def _linear_then(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def linear_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return loss(F.linear(hidden, weight), target)

    return linear_loss


def _contenders(gradients: bool) -> list[Contender]:
    stock = _linear_then(F.cross_entropy)
    contenders = [
        Function("fastnn", fastnn.functional.linear_cross_entropy),
        Function("F.linear, F.cross_entropy", stock),
        Compiled("torch.compile", stock),
        JaxHead("jax.jit", gradients, devices=(CPU.name,)),
        *(
            Function(name, peer, jit=True, same_algorithm=False, devices=(CUDA.name,))
            for name, peer in (
                ("Liger", _liger),
                ("QuACK", _quack),
                ("cut-cross-entropy", _cut_cross_entropy),
            )
        ),
    ]
    if gradients:  # a forward alone gives the auto-chunker nothing to chunk
        contenders += [
            AutoChunked(
                f"torch.compile, auto-chunker, {chunks} chunks", stock, chunks, same_algorithm=False
            )
            for chunks in AUTO_CHUNKS
        ]
    return contenders + (_linear_cross_entropies() if hasattr(F, "linear_cross_entropy") else [])


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        raise Unavailable("liger_kernel is not installed") from None
    return liger_fused_linear_cross_entropy(hidden, weight, target)


def _quack(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError:
        raise Unavailable("quack is not installed") from None
    return chunked_linear_cross_entropy(hidden, weight, target)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise Unavailable("cut_cross_entropy is not installed") from None
    return linear_cross_entropy(hidden, weight, target)


def _linear_cross_entropies() -> list[Contender]:
    """Torch's function for both, which without options just calls one operator after the other."""
    name, make_options = "F.linear_cross_entropy", torch.nn.LinearCrossEntropyOptions
    chunked = {
        "default options": make_options(),
        "aspect ratio": make_options(chunking_method="aspect_ratio"),
        **{f"{rows} rows": make_options(batch_chunk_size=rows) for rows in CHUNK_ROWS},
        "256 rows, compact": make_options(batch_chunk_size=256, acc_policy="compact"),
    }
    return [
        Function(f"{name}, unfused", F.linear_cross_entropy),
        *(
            Function(f"{name}, {label}", _chunked(options), same_algorithm=False)
            for label, options in chunked.items()
        ),
    ]


def _chunked(options: torch.nn.LinearCrossEntropyOptions) -> Callable[..., Tensor]:
    """Torch's own chunked fusion of both; its forward already computes the gradients."""

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=options)

    return linear_cross_entropy


@dataclass
class AutoChunked(Compiled):
    """``torch.compile`` with inductor's auto-chunker: chunks of rows, each forward and backward.

    Inductor silently compiles a graph that it can't chunk as a whole. That would be
    ``torch.compile`` again under another name, so the contender is then unavailable.
    """

    chunks: int

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        if self.is_ready:
            return super().bind(inputs)
        # Deferred: importing the compiler takes seconds.
        from torch._functorch import config as autograd_config
        from torch._inductor import config, metrics

        if not hasattr(config, "auto_chunker"):
            raise Unavailable("this torch's compiler has no auto-chunker")
        options = {
            "auto_chunker.enable": True,
            "auto_chunker.num_chunk": self.chunks,
            # The least ratio of product to factors: the default, 8, would need thousands of rows.
            "auto_chunker.amplify_ratio_threshold": 1,
        }
        self.function = torch.compile(self.function, dynamic=False, options=options)
        self.is_ready = True
        call, before = super().bind(inputs), metrics.num_auto_chunking
        # A graph from the cache would skip the pass that chunks and counts.
        with autograd_config.patch(enable_autograd_cache=False):
            call()
        if metrics.num_auto_chunking == before:
            raise Unavailable("the auto-chunker leaves this graph whole")
        return call


@dataclass
class MeanOverRows(Function):
    """The reference, from some rows at a time: all logits in float64 might not fit the memory."""

    def exact(self, inputs: Inputs) -> list[Tensor]:
        hidden, weight, target = inputs.args
        size = max(1, EXACT_ELEMENTS // len(weight))
        parts = []
        for rows, targets in zip(hidden.split(size), target.split(size), strict=True):
            rows = rows.detach().requires_grad_(hidden.requires_grad)
            results = self.check(Inputs((rows, weight, targets)).double())
            results = results if isinstance(results, tuple) else (results,)
            share = len(rows) / len(hidden)
            parts.append([result.detach() * share for result in results])
        loss, *gradients = zip(*parts, strict=True)
        if not gradients:
            return [sum(loss)]
        of_hidden, of_weight = gradients
        return [sum(loss), torch.cat(of_hidden), sum(of_weight)]


@dataclass
class JaxHead(JaxProcess):
    """The loss, and the gradients where they are wanted, jitted as a whole."""

    gradients: bool

    def check(self, inputs: Inputs) -> list[Tensor]:
        self._start("Head", self.gradients)
        self._send(inputs)
        return [torch.from_numpy(result) for result in self._ask("results")]
