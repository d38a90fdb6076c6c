"""The benchmarks' own arithmetic and command line. What they measure is no test's business."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed with the package

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import (  # noqa: E402
    limits,
    memory,
    plots,
    report,
    resident,
    results,
    table,
    verify,
    worker,
)
from benchmarks.case import Contender, Function, Inputs, Unavailable, Work  # noqa: E402
from benchmarks.cases import all_cases, cross_entropy, mlp, overhead, sgd  # noqa: E402
from benchmarks.device import CPU, CUDA, Cuda, Device  # noqa: E402
from benchmarks.timing import Plan, Summary, measure, summarise  # noqa: E402
from fastnn import _extension  # noqa: E402

pytestmark = pytest.mark.cpu_only("the benchmarks")

PLAN = Plan(seconds=0.1, sample_seconds=0.01, min_rounds=3)


class Fake:
    """A contender whose calls take a given time by its own clock, and a log of the samples."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int, int]]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def sampler(self, draw: int):
        def sample(count: int) -> float:
            self.log.append((self.name, count, draw))
            return self.seconds * count

        return sample


def measure_fakes(times: dict[str, float], clock=lambda: 0.0, plan: Plan = PLAN):
    """Measures fakes; returns the summaries and the log of (name, count, number of the draw)."""
    log: list[tuple[str, int, int]] = []
    fakes = [Fake(name, seconds, log) for name, seconds in times.items()]
    draws = iter(range(10**6))

    def draw():
        number = next(draws)
        return {fake.name: fake.sampler(number) for fake in fakes}

    return measure(draw, plan, random.Random(0), clock), log


def make_result(times: dict[str, float], **changes) -> dict:
    contenders = {
        name: {
            "median": seconds,
            "low": seconds,
            "high": seconds,
            "least": seconds,
            "samples": 1,
            "interruptions": 0.0,
            "trainable": name != "inference",
            "same_algorithm": True,
        }
        for name, seconds in times.items()
    }
    result = {
        "op": "op",
        "label": "4 x 4",
        "dtype": "float32",
        "mode": "forward",
        "threads": 1,
        "unit": "seconds",
        "work": {"flops": 0.0, "bytes": 0.0},
        "contenders": contenders,
        "skipped": {},
    }
    return result | changes


LIMITS = {"gemm": {"float32": 1e9, "bfloat16": 2e9}, "copy": {"1000": 4e9, "8000": 1e9}}


def make_document(*documents_results: dict) -> dict:
    return {
        "schema": results.SCHEMA,
        "machine": {
            "cpu": "A Processor",
            "processors": "2",
            "os": "Some OS",
            "torch": "2.13.0",
            "fastnn": "0.1.0",
            "capability": "avx2",
            "capability of torch": "AVX2",
            "date": "2026-01-02",
        },
        "command": "python -m benchmarks --threads 1",
        "limits": {"1": LIMITS},
        "results": [results.complete(result, LIMITS) for result in documents_results],
    }


WON = make_result({"fastnn": 1e-3, "slow": 4e-3, "quick": 2e-3}, op="won")
LOST = make_result({"fastnn": 1e-3, "ahead": 0.5e-3}, op="lost")


# ---- timing --------------------------------------------------------------------------------------


def test_measure_reports_each_contenders_time_per_call():
    summaries, _ = measure_fakes({"a": 1e-3, "b": 3e-3})
    assert summaries["a"].median == pytest.approx(1e-3)
    assert summaries["b"].median == pytest.approx(3e-3)


def test_measure_takes_contenders_in_turn_in_changing_order():
    _, log = measure_fakes({"a": 1e-3, "b": 1e-3, "c": 1e-3}, plan=Plan(1.0, 0.01, 3))
    samples = [name for name, count, _ in log if count == 10]  # the others are warm-up
    samples = samples[len(samples) % 3 :]
    rounds = [tuple(samples[i : i + 3]) for i in range(0, len(samples), 3)]
    assert len(rounds) >= 50
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


def test_measure_draws_fresh_inputs_in_each_round_where_that_is_cheap():
    summaries, log = measure_fakes({"a": 1e-3})
    assert len({draw for *_, draw in log}) == summaries["a"].samples >= 10


def test_measure_keeps_its_inputs_where_drawing_takes_long():
    ticks = iter(range(10**6))
    _, log = measure_fakes({"a": 1e-3}, clock=lambda: float(next(ticks)))
    assert {draw for *_, draw in log} == {0}


def test_measure_takes_the_least_number_of_rounds_of_slow_calls():
    summaries, log = measure_fakes({"a": 60.0})
    assert summaries["a"].samples == PLAN.min_rounds
    assert len(log) == PLAN.min_rounds + 1  # and one call to warm up


def test_measure_warms_up_before_each_sample_of_quick_calls():
    _, log = measure_fakes({"a": 1e-3, "b": 1e-3})
    counts = [count for _, count, _ in log]
    assert counts[-8:] == [1, 10] * 4


def test_measure_counts_the_interruptions_of_each_contenders_samples():
    interrupted = iter(range(10**6))  # one more each time it is asked
    fakes = {"a": lambda count: 0.01, "b": lambda count: 0.02}
    summaries = measure(
        lambda: fakes, PLAN, random.Random(0), lambda: 0.0, lambda: next(interrupted)
    )
    assert summaries["a"].interruptions == pytest.approx(100)
    assert summaries["b"].interruptions == pytest.approx(50)


def test_summary_is_median_and_quartiles():
    summary = summarise([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (summary.low, summary.median, summary.high) == (2.0, 3.0, 5.0)
    assert (summary.least, summary.samples) == (1.0, 5)
    assert summarise([4.0]) == Summary(4.0, 4.0, 4.0, 4.0, 1)


# ---- devices -------------------------------------------------------------------------------------


class FakeGpu:
    """Stands in for torch.cuda, with a clock of its own in milliseconds and a log."""

    FLUSH, CALL, L2 = 100.0, 3.0, 1000

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now, self.allocated, self.peak = 0.0, 500, 9999
        self.buffer_size = 0

    def device(self) -> Cuda:
        return Cuda(self, self._make_buffer)

    def _make_buffer(self, size: int) -> SimpleNamespace:
        self.buffer_size = size
        return SimpleNamespace(zero_=lambda: self.work("flush", self.FLUSH))

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds

    def call(self) -> None:
        self.work("call", self.CALL)
        self.peak = max(self.peak, self.allocated + 70)

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.log.append("synchronise")

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=self.L2)

    def get_device_name(self) -> str:
        return "A GPU"

    def get_device_capability(self) -> tuple[int, int]:
        return 9, 0

    def memory_allocated(self) -> int:
        return self.allocated

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak


class FakeEvent:
    """A moment of the fake's clock; as on a GPU it can't be read before a synchronisation."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.log.append("event")
        self.moment = self.gpu.now

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.gpu.log[-1] == "synchronise"
        return end.moment - self.moment


class Meta(Device):
    """Torch's device without data: what ends up elsewhere shows."""

    name = "meta"


def test_time_calls_makes_all_calls_and_synchronises():
    log: list[str] = []
    device = Device()
    device.synchronize = lambda: log.append("synchronise")
    assert device.time_calls(lambda: log.append("call"), 3) > 0
    assert log == ["synchronise", "call", "call", "call", "synchronise"]


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_kernels_are_timed_by_events_after_the_l2_is_flushed(mode: str):
    gpu = FakeGpu()
    seconds = gpu.device().timer(mode)(gpu.call, 3)
    assert gpu.log == ["flush", "event", "call", "event"] * 3 + ["synchronise"]
    assert seconds == pytest.approx(3 * FakeGpu.CALL * 1e-3)  # without the flushes
    assert gpu.buffer_size >= 2 * FakeGpu.L2


@pytest.mark.parametrize("mode", ["step", "call"])
def test_what_launches_cost_is_timed_by_the_clock(mode: str):
    gpu = FakeGpu()
    assert 0 < gpu.device().timer(mode)(gpu.call, 2) < 1
    assert gpu.log == ["synchronise", "call", "call", "synchronise"]


def test_peak_memory_of_a_gpu_is_what_a_call_adds():
    gpu = FakeGpu()
    assert gpu.device().peak_growth(gpu.call) == 70
    assert gpu.log == ["synchronise", "call", "synchronise"]


def test_inputs_on_another_device_are_the_same_leaves():
    leaf, plain = torch.ones(2, requires_grad=True), torch.ones(3)
    target = torch.zeros(2, dtype=torch.int64)
    here = Inputs((leaf, target, [plain]), torch.ones(2))
    there = here.on(Meta())
    assert [arg.requires_grad and arg.is_leaf for arg in there.args[:2]] == [True, False]
    assert there.leaves == (there.args[0],)
    assert not there.args[2][0].requires_grad
    everything = [*there.args[:2], *there.args[2], there.grad]
    assert {tensor.device.type for tensor in everything} == {"meta"}
    assert [tensor.dtype for tensor in everything[:2]] == [torch.float32, torch.int64]
    assert here.on(CPU).args[0] is leaf


def _meta_inputs(make) -> Inputs:
    return make(torch.Generator().manual_seed(0)).on(Meta())


def test_what_contenders_make_themselves_lies_where_the_inputs_are():
    step = next(one for one in mlp._contenders("cross_entropy") if one.name == "torch")
    step.bind(_meta_inputs(mlp._batch))
    optimizer = next(one for one in sgd.step_contenders() if one.name == "SGD")
    shapes = [(2, 3), (4,)]
    optimizer.bind(_meta_inputs(partial(sgd.parameters_and_gradients, shapes=shapes)))
    layer = overhead.Backward("torch", *overhead._layers()["torch"])
    layer.bind(_meta_inputs(overhead._row))
    parameters = [*step.params, *optimizer.params, *layer.modules[0].parameters()]
    assert len(parameters) == 6 + 2 + 2
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert overhead._reference_layer(torch.ones(1, 8, device="meta")).device.type == "meta"


def names_on(device: Device) -> set[str]:
    contenders = [one for case in all_cases() for one in case.contenders()]
    return {one.name for one in contenders if device.name in one.devices}


def test_peers_compete_on_their_own_devices():
    cpu, cuda = names_on(CPU), names_on(CUDA)
    assert cpu - cuda == {"mkldnn", "mkldnn packed", "jax.jit"}
    assert cuda - cpu == {"Liger", "Apex", "Apex FusedSGD"}
    assert {"fastnn", "torch.compile", "SGD", "SGD foreach", "SGD fused"} <= cpu & cuda


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("liger_kernel", lambda: cross_entropy._liger(torch.ones(1, 2), torch.zeros(1).long())),
        ("apex", lambda: cross_entropy._apex(torch.ones(1, 2), torch.zeros(1).long())),
        ("apex", lambda: sgd._apex_sgd([torch.ones(2)])),
    ],
)
def test_a_peer_that_is_not_installed_is_unavailable(module: str, call, monkeypatch):
    for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(Unavailable, match=f"{module}.* is not installed"):
        call()


def test_a_destructive_peer_leaves_the_others_their_inputs():
    def overwriting(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = (logits * target).sum()
        logits.data.zero_()
        return loss

    inputs = Inputs((torch.ones(3, requires_grad=True), torch.full((3,), 2.0)))
    call = cross_entropy.Destructive("peer", overwriting).bind(inputs)
    loss, gradient = call()
    assert loss == 6 and torch.equal(gradient, inputs.args[1])
    assert torch.equal(inputs.args[0], torch.ones(3))


@pytest.mark.parametrize("name", ["peer", "fastnn"])
def test_memory_mode_goes_on_without_a_peer_that_refuses(name: str, monkeypatch):
    def peak_memory(case, contender: str, device: Device) -> Summary:
        if contender == name:
            raise Unavailable("not installed")
        return summarise([1.0])

    monkeypatch.setattr(memory, "peak_memory", peak_memory)
    outcome = worker.Outcome([Contender("fastnn"), Contender("peer")])
    if name == "fastnn":
        with pytest.raises(RuntimeError, match="fastnn: not installed"):
            worker._memory(None, outcome, CPU)
        return
    assert list(worker._memory(None, outcome, CPU)) == ["fastnn"]
    assert outcome.skipped == {"peer": "not installed"}
    assert [one.name for one in outcome.contenders] == ["fastnn"]


def test_memory_process_reports_a_refusal(monkeypatch):
    said = subprocess.CompletedProcess([], 0, stdout='noise\n"not installed"\n')
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: said)
    case = next(case for case in all_cases() if case.mode == "memory")
    with pytest.raises(Unavailable, match="not installed"):
        memory.peak_memory(case, "Liger", CUDA)


def test_worker_measures_on_the_device_of_the_request(monkeypatch):
    gpu = FakeGpu()
    device = gpu.device()
    device.name = "cpu"  # where the tensors are; the clock is the fake's
    device.gemm_sizes = dict.fromkeys(device.gemm_sizes, (8,))
    device.available_bytes = lambda: float("inf")
    assert device.interruptions() == 0
    device.interruptions = partial(next, count())  # one in each sample, of three calls
    monkeypatch.setattr(worker, "DEVICES", {"cuda": device})
    monkeypatch.setattr(limits, "COPY_BYTES", (1024,))
    # Every call and copy takes the fake no time; its clock only shows that it was asked.
    monkeypatch.setattr(FakeEvent, "elapsed_time", lambda start, end: FakeGpu.CALL)
    key = "nll_loss 64 x 10 float32 forward"
    events: list[dict] = []
    plan = Plan(seconds=0.02, sample_seconds=0.01, min_rounds=3)
    worker.run(
        worker.Request([key], torch.get_num_threads(), False, plan, 0.01, "cuda"), events.append
    )
    assert [event["event"] for event in events] == ["limits", "start", "result", "limits"]
    assert events[0]["limits"]["copy"]["1024"] == pytest.approx(1024 / (FakeGpu.CALL * 1e-3))
    contenders = events[2]["result"]["contenders"]
    assert contenders["fastnn"]["median"] == pytest.approx(FakeGpu.CALL * 1e-3)
    assert contenders["fastnn"]["interruptions"] == pytest.approx(1 / (3 * FakeGpu.CALL * 1e-3))
    assert gpu.log.count("flush") == gpu.log.count("event") / 2 > 10


@pytest.mark.parametrize(
    ("is_available", "build_info", "message"),
    [
        (False, {"cuda": True}, "needs a CUDA device that torch can use, and torch finds none"),
        (True, {"cuda": False}, "needs fastnn's CUDA part, and fastnn was built without it"),
    ],
)
def test_cuda_that_can_not_be_used_ends_in_one_sentence(
    is_available: bool, build_info: dict, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(_extension, "build_info", lambda: build_info)
    assert cli.main(["--device", "cuda", "--filter", "overhead"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"benchmarks: error: --device cuda {message}"


def test_cuda_with_a_device_and_the_kernels_has_no_complaint(monkeypatch):
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda": True})
    assert Cuda(SimpleNamespace(is_available=lambda: True)).complaint() is None
    assert CPU.complaint() is None


def test_command_line_chooses_and_records_the_device():
    options = cli.parse_options(["--device", "cuda"])
    assert (options.device, options.threads) == (CUDA, (1,))
    assert cli._command(options) == "python -m benchmarks --device cuda --threads 1"
    assert cli.parse_options(["--device", "cuda", "--threads", "2"]).threads == (2,)
    options = cli.parse_options(["--threads", "1"])
    assert options.device is CPU
    assert cli._command(options) == "python -m benchmarks --threads 1"
    assert cli.parse_options([]).threads == CPU.default_threads()


def test_document_table_plots_and_report_name_the_gpu(tmp_path: Path, monkeypatch):
    facts = FakeGpu().device().facts()
    assert facts["gpu"] == "A GPU" and facts["capability"] == "CUDA sm_90"
    assert facts["capability of torch"] == f"CUDA {torch.version.cuda}"
    document = make_document(WON, LOST)
    titles: list[str] = []
    monkeypatch.setattr(plots, "_draw", lambda results, value, title, *rest: titles.append(title))

    def texts() -> tuple[str, str, list[str]]:
        titles.clear()
        plots.draw(document, tmp_path)
        return table.format_document(document), report.markdown(document, []), list(titles)

    shown, written, titled = texts()
    assert "won, 1 thread\n" in shown and ": A Processor (2 processors" in written
    assert all(title.endswith("(A Processor)") for title in titled)
    document["machine"] |= facts
    shown, written, titled = texts()
    assert "won, A GPU, 1 thread\n" in shown
    assert ": A GPU, A Processor (2 processors" in written and "(CUDA sm_90 kernels)" in written
    assert len(titled) == 2 and all(title.endswith("(A GPU)") for title in titled)


def test_run_records_the_facts_of_the_device(monkeypatch):
    monkeypatch.setattr(cli, "_events", lambda request: iter([{"event": "limits", "limits": None}]))
    options = cli.parse_options(["--threads", "1", "--filter", "overhead"])
    document, _ = cli.run(options, [])
    assert "gpu" not in document["machine"]
    document, _ = cli.run(replace(options, device=FakeGpu().device()), [])
    assert document["machine"]["gpu"] == "A GPU"


# ---- results -------------------------------------------------------------------------------------


def test_ratios_and_best_peers():
    result = results.complete(
        make_result({"fastnn": 2.0, "slow": 8.0, "quick": 3.0, "inference": 1.0}), None
    )
    assert result["ratios"] == {"slow": 4.0, "quick": 1.5, "inference": 0.5}
    assert (result["best"], result["best_trainable"]) == ("inference", "quick")
    assert results.best_ratio(result) == 0.5


def test_share_of_the_limit():
    gemm = make_result({"fastnn": 1.0, "peer": 1.0}, work={"flops": 5e8, "bytes": 0.0})
    assert results.complete(gemm, LIMITS)["share"] == pytest.approx(0.5)
    assert limits.limit_for(Work(flops=1), "bfloat16", LIMITS) == 2e9
    # The copy of the next larger size, of the largest where none is larger.
    moved = [limits.limit_for(Work(bytes=size), "float32", LIMITS) for size in (9, 1001, 10**6)]
    assert moved == [4e9, 1e9, 1e9]
    assert results.complete(make_result({"fastnn": 1.0}), LIMITS)["share"] is None


def test_memory_is_compared_in_whole_mebibytes():
    def ratio(ours: int, peer: int) -> float:
        result = make_result({"fastnn": ours, "peer": peer}, unit="bytes", mode="memory")
        return results.complete(result, None)["ratios"]["peer"]

    assert ratio(0, 4096) == 1
    assert ratio(2 * 2**20 + 4096, 6 * 2**20) == 3


def test_overall_counts_wins_and_finds_the_worst():
    document = make_document(WON, LOST, make_result({"fastnn": 1.0}))
    facts = results.overall(document["results"])
    assert (facts["cases"], facts["ahead"]) == (2, 1)
    assert facts["geometric_mean"] == pytest.approx(1.0)  # of 2 and 0.5
    assert facts["worst"]["op"] == "lost"
    assert results.overall([]) is None


def test_best_of_two_limits():
    other = {"gemm": {"float32": 3e9, "bfloat16": 1e9}, "copy": {"1000": 1.0, "8000": 2e9}}
    assert limits.best_of(LIMITS, other) == {
        "gemm": {"float32": 3e9, "bfloat16": 2e9},
        "copy": {"1000": 4e9, "8000": 2e9},
    }


# ---- verification --------------------------------------------------------------------------------


def test_error_is_relative_and_sees_wrong_gradients():
    x = torch.rand(50, requires_grad=True)  # positive: a sum near zero has a large relative error
    right, wrong = (
        Function("a", torch.sum),
        Function("b", lambda x: x.sum() + 0.1 * x.detach().sum()),
    )
    reference = list(verify._tensors(right.check(Inputs((x,)).double())))
    # 50 additions, each of which rounds by at most 6e-8.
    assert verify.error(right, Inputs((x,)), reference) < 3e-6
    assert verify.error(wrong, Inputs((x,)), reference) == pytest.approx(0.1, rel=1e-3)
    halved = Function("c", lambda x: x.sum() - 0.5 * (x - x.detach()).sum())
    assert verify.error(halved, Inputs((x,)), reference) == pytest.approx(0.5, rel=1e-3)
    nan = Function("d", lambda x: x.sum() * float("nan"))
    assert verify.error(nan, Inputs((x,)), reference) == float("inf")


def test_every_case_has_a_name_of_its_own_and_ours_among_its_contenders():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        names = [contender.name for contender in case.contenders()]
        assert names.count("fastnn") == 1
        assert len(set(names)) == len(names) > 1


def test_resnet18_has_its_parameters():
    shapes = sgd.resnet18()
    assert len(shapes) == 62
    assert sum(torch.Size(shape).numel() for shape in shapes) == 11_689_512


@pytest.mark.skipif(not resident.supported(), reason="the system does not reset a process's peak")
def test_peak_memory_sees_what_a_call_allocates():
    growth = CPU.peak_growth(lambda: torch.ones(8 * 2**20))
    assert growth == pytest.approx(32 * 2**20, rel=0.1)


# ---- compiled peers ------------------------------------------------------------------------------


def compiler_has(*names: str) -> bool:
    """Whether the installed torch's compiler has such settings (dynamo's, inductor's)."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    return all(hasattr(dynamo, name) or hasattr(inductor, name) for name in names)


needs_traced_backward = pytest.mark.skipif(
    not compiler_has("trace_autograd_ops"), reason="the compiler can't trace a backward"
)
needs_auto_chunker = pytest.mark.skipif(
    not compiler_has("auto_chunker"), reason="the compiler has no auto-chunker"
)
needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"),
    reason="torch has no linear_cross_entropy",
)


@needs_traced_backward
def test_compiled_steps_train_as_the_reference_and_hold_their_backward(fresh_dynamo):
    """All contenders in one process, as the benchmark has them: they share a limit."""
    from torch._dynamo.utils import counters

    case = next(case for case in mlp.cases() if case.label == "LogSoftmax+NLLLoss")
    inputs = verify.check_inputs(case, torch.Generator().manual_seed(0))
    reference = verify.expected(case, inputs)
    graphs, breaks = {}, {}
    for contender in case.contenders():
        if contender.compiled:
            counters.clear()
            assert verify.error(contender, inputs, reference) <= case.allowed_error, contender.name
            name = contender.name.removeprefix("torch.compile, ")
            graphs[name] = counters["stats"]["unique_graphs"]
            breaks[name] = list(counters["graph_break"])
            # The benchmark's later calls run what the check has compiled.
            contender.sampler(inputs)(2)
            assert counters["stats"]["unique_graphs"] == graphs[name]
    assert len(graphs) == 6
    assert graphs["one graph"] == graphs["one graph, cpp_wrapper"] == 1
    optimizers_own = "Call to `torch._dynamo.graph_break()`"
    assert all(
        reason.startswith(optimizers_own) for reasons in breaks.values() for reason in reasons
    )
    assert not breaks["one graph"]


def test_a_step_that_the_compiler_can_not_trace_is_unavailable(monkeypatch):
    import torch._dynamo

    case = mlp.cases()[0]
    traced = [one for one in case.contenders() if isinstance(one, mlp.TracedStep)]
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())  # as in an older torch
    assert len(traced) == 4
    for contender in traced:
        with pytest.raises(Unavailable, match="can't trace a backward"):
            contender.check(mlp._batch(torch.Generator()))


def small_vocabulary(rows: int, features: int) -> Inputs:
    """Logits of 2 MiB, of which inductor's auto-chunker needs 1."""
    return cross_entropy._features_weight_targets(
        torch.Generator().manual_seed(0), rows, features, 2**19 // rows, gradients=True
    )


def auto_chunked() -> cross_entropy.AutoChunked:
    contenders = cross_entropy._vocabulary_contenders(gradients=True)
    return next(one for one in contenders if isinstance(one, cross_entropy.AutoChunked))


@needs_auto_chunker
def test_auto_chunker_chunks_and_gives_the_references_numbers(fresh_dynamo):
    stock = Function("reference", cross_entropy._linear_then(torch.nn.functional.cross_entropy))
    inputs = small_vocabulary(64, 16)
    reference = list(verify._tensors(stock.check(inputs.double())))
    for _ in range(2):  # the compiler's cache knows the second one
        torch._dynamo.reset()
        contender = auto_chunked()
        assert verify.error(contender, inputs, reference) < 1e-5
        contender.bind(inputs)  # what is compiled stays


@needs_auto_chunker
def test_auto_chunker_that_leaves_a_graph_whole_is_unavailable(fresh_dynamo):
    with pytest.raises(Unavailable, match="leaves this graph whole"):
        auto_chunked().bind(small_vocabulary(64, 64))  # more weights than logits


def test_auto_chunker_is_unavailable_where_inductor_has_none(monkeypatch):
    import torch._inductor.metrics

    monkeypatch.setattr(torch._inductor, "config", SimpleNamespace())
    with pytest.raises(Unavailable, match="has no auto-chunker"):
        auto_chunked().bind(small_vocabulary(64, 16))


@needs_linear_cross_entropy
def test_linear_cross_entropy_is_named_for_what_it_runs():
    inputs = small_vocabulary(256, 16)
    names = ("unfused", "default options", "64 rows", "256 rows")
    contenders = {one.name: one for one in cross_entropy._vocabulary_contenders(gradients=False)}
    operators, products = {}, {}
    for name in names:
        contender = contenders[f"F.linear_cross_entropy, {name}"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            contender.bind(inputs)()
        calls = [event.name for event in profile.events()]
        operators[name] = "aten::cross_entropy_loss" in calls
        products[name] = sum(call in ("aten::mm", "aten::addmm") for call in calls)
        assert contender.same_algorithm == (name == "unfused")
    assert operators == {name: name == "unfused" for name in names}
    assert products["64 rows"] == 4 * products["256 rows"] < products["default options"]


def test_fused_sgd_competes_over_bfloat16_where_torch_steps_right():
    """torch before 2.14.1 leaves most bfloat16 parameters where they are."""
    case = sgd._step_case("small", [(1000,), (7,)], torch.bfloat16)
    params, grads = case.inputs(torch.Generator().manual_seed(0)).args
    moved = [torch.nn.Parameter(param.clone()) for param in params]
    for param, grad in zip(moved, grads, strict=True):
        param.grad = grad
    torch.optim.SGD(moved, lr=1.0, fused=True).step()
    is_right = all(
        torch.allclose(new, old - grad, rtol=2**-7)
        for new, old, grad in zip(moved, params, grads, strict=True)
    )
    outcome = worker.Outcome([one for one in case.contenders() if one.name == "SGD fused"])
    worker._check(case, outcome, torch.Generator().manual_seed(0), CPU)
    assert [one.name for one in outcome.contenders] == ["SGD fused"] * is_right
    assert [reason.startswith("wrong by") for reason in outcome.skipped.values()] == [True] * (
        not is_right
    )


# ---- table and report ----------------------------------------------------------------------------


def test_table_marks_losses():
    lines = table.format_document(make_document(WON, LOST)).splitlines()
    rows = [line for line in lines if "4 x 4" in line and "fwd" in line]
    assert [row.rstrip().endswith("!") for row in rows] == [False, True]
    assert "2.00" in rows[0] and "4.00" in rows[0]
    assert "in 1 of 2 cases" in lines[-1] and "worst 0.50x (lost" in lines[-1]


def test_table_and_report_say_when_the_machine_was_busy():
    busy = make_result({"fastnn": 1.0, "peer": 2.0})
    busy["contenders"]["fastnn"]["interruptions"] = 100.0
    document = make_document(WON, busy)
    assert "in 1 of 2 cases: with" in table.format_document(document)
    assert "processor time in 1 of 2 cases" in report.markdown(document, [])
    assert "Other programs" not in table.format_document(make_document(WON))
    assert "Other programs" not in report.markdown(make_document(WON), [])


def test_a_ratio_just_below_one_does_not_read_as_one():
    assert table.ratio_text(0.9999) == "0.99"
    assert table.ratio_text(1.0) == "1.00"


def write_readme(folder: Path, text: str) -> tuple[Path, Path]:
    readme, saved = folder / "README.md", folder / "results.json"
    readme.write_text(text)
    saved.write_text(json.dumps(make_document(WON, LOST)))
    return readme, saved


def test_report_replaces_what_is_between_the_markers(tmp_path: Path):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    readme, saved = write_readme(tmp_path, text)
    arguments = [str(saved), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    assert report.main(arguments) == 0
    once = readme.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\n") and once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once
    assert "A Processor" in once and "2026-01-02" in once and "1 thread" in once
    assert "**0.50x**" in once  # losses are shown
    assert "(plots/ratio.png)" in once
    assert (tmp_path / "plots" / "ratio.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(arguments) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["no markers", f"{report.END}\n{report.BEGIN}", report.BEGIN])
def test_report_refuses_a_readme_without_markers(tmp_path: Path, text: str, capsys):
    readme, saved = write_readme(tmp_path, text)
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert "the readme needs one" in capsys.readouterr().err
    assert readme.read_text() == text


def test_report_refuses_other_files(tmp_path: Path, capsys):
    readme, saved = write_readme(tmp_path, f"{report.BEGIN}{report.END}")
    saved.write_text("[]")
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert report.main([str(tmp_path / "none"), "--readme", str(readme)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "holds no results" in errors[0] and "can't be read" in errors[1]


def test_plots_show_what_there_is(tmp_path: Path):
    drawn = plots.draw(make_document(WON, LOST), tmp_path)
    assert [path.name for path in drawn] == ["ratio.png"]  # none of these has a limit


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "'tpu' is not a device; the devices are cpu, cuda"),
        (["--threads", "0"], "expected thread counts such as 1,2, got '0'"),
        (["--threads", "1,x"], "expected thread counts such as 1,2, got '1,x'"),
        (["--modes", "backward"], "'backward' is not a mode; the modes are forward"),
        (["--filter", "("], "'(' is not a regular expression"),
        (["--seconds", "-1"], "expected a number of seconds above 0, got '-1'"),
        (["--json", "no/such/folder/file.json"], "is not a file in an existing folder"),
        (["--filter", "no such case"], "no case matches --filter and --modes"),
    ],
)
def test_bad_arguments_give_one_sentence(flags: list[str], message: str, capsys):
    try:
        code = cli.main(flags)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_quick_run_writes_valid_json(tmp_path: Path):
    saved = tmp_path / "results.json"
    flags = ["--quick", "--seconds", "0.01", "--filter", "overhead", "--threads", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *flags, "--json", str(saved)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    text = saved.read_text()
    document = json.loads(text)
    wanted = [case.key for case in all_cases() if case.op == "overhead"]
    assert [results.key(result) for result in document["results"]] == wanted
    assert all(result["contenders"]["fastnn"]["median"] > 0 for result in document["results"])
    assert "fastnn is ahead of the best peer in" in run.stdout
    assert str(ROOT) not in text and str(tmp_path) not in text
