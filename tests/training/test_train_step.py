"""A training step as the ordinary loop: the loop's bits, in everything that the loop changes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import fastnn
from support.training_programs import (
    CLASSES,
    FEATURES,
    OPTIMIZERS,
    Training,
    batch,
    everything,
    make_training,
    same,
)

pytestmark = [
    pytest.mark.cpu_only("the loop in Python, whatever the kernels"),
    pytest.mark.usefixtures("no_fused_way"),
]

STEPS = 12
PROGRAMS = range(30)


def call(step: fastnn.TrainStep, index: int) -> Tensor:
    torch.manual_seed(index)  # Dropout draws the same
    return step(*batch(index))


def loop(training: Training, index: int) -> Tensor:
    torch.manual_seed(index)
    return training.loop(index, *batch(index))


def small(optimizer=fastnn.optim.SGD, **options) -> Training:
    """A model with changing buffers and random numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES)
    )
    kwargs = {"lr": 0.05} | ({"momentum": 0.9} if issubclass(optimizer, torch.optim.SGD) else {})
    return Training(model, nn.CrossEntropyLoss(), optimizer(model.parameters(), **kwargs), options)


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", PROGRAMS)
def test_random_programs(seed):
    ours, theirs = make_training(seed), make_training(seed)
    step = ours.step()
    for index in range(STEPS):
        assert same(call(step, index), loop(theirs, index))
        assert same(ours.everything(), theirs.everything()), index


def test_the_random_programs_have_what_they_may_have():
    """Otherwise a changed choice could silently leave something out."""
    trainings = [make_training(seed) for seed in PROGRAMS]
    assert {type(training.optimizer) for training in trainings} == {kind for kind, _ in OPTIMIZERS}
    modules = {type(module).__name__ for t in trainings for module in t.model.modules()}
    assert {"BatchNorm1d", "Dropout", "Shared", "Residual", "FusedSequential"} <= modules
    assert {t.options["accumulate"] for t in trainings} == {1, 2, 3}
    assert {t.options["clip_grad_norm"] for t in trainings} == {None, 0.1}
    assert {len(t.optimizer.param_groups) for t in trainings} == {1, 2}


@pytest.mark.parametrize("seed", PROGRAMS[:10])
def test_loop_and_step_take_over_from_one_another(seed):
    """They alternate between accumulations."""
    ours, theirs = make_training(seed), make_training(seed)
    step, index = ours.step(), 0
    for turn in range(4):
        for _ in range(3 * ours.options["accumulate"]):
            loss = call(step, index) if turn % 2 else loop(ours, index)
            assert same(loss, loop(theirs, index))
            index += 1
        assert same(ours.everything(), theirs.everything())


@pytest.mark.parametrize("kind", [fastnn.optim.SGD, torch.optim.AdamW])
def test_saved_and_loaded_midway(kind):
    ours, theirs = small(kind), small(kind)
    step = ours.step()
    for index in range(4):
        call(step, index), loop(theirs, index)
    file = io.BytesIO()
    torch.save([ours.model.state_dict(), ours.optimizer.state_dict()], file)
    file.seek(0)
    model_state, optimizer_state = torch.load(file)
    resumed = small(kind)
    resumed.model.load_state_dict(model_state)
    resumed.optimizer.load_state_dict(optimizer_state)
    step = resumed.step()
    for index in range(4, 8):
        assert same(call(step, index), loop(theirs, index))
    assert same(resumed.everything(), theirs.everything())


def test_a_state_dict_loaded_into_a_live_step():
    ours, theirs = small(), small()
    step = ours.step()
    call(step, 0)
    start = small()
    ours.model.load_state_dict(start.model.state_dict())
    ours.optimizer.load_state_dict(start.optimizer.state_dict())
    for index in range(3):
        assert same(call(step, index), loop(theirs, index))
    assert same(ours.everything(), theirs.everything())


def test_a_model_that_changes():
    """A layer and its parameters are added, another is frozen, an option is changed."""
    ours, theirs = small(), small()
    step = ours.step()
    for index in range(6):
        if index == 2:
            for training in (ours, theirs):
                torch.manual_seed(1)
                training.model[4] = nn.Linear(8, CLASSES)
                training.optimizer.add_param_group({"params": training.model[4].parameters()})
        if index == 4:
            for training in (ours, theirs):
                training.model[0].requires_grad_(False)
                training.model.eval()
                training.optimizer.param_groups[0]["weight_decay"] = 0.1
        assert same(call(step, index), loop(theirs, index))
        assert same(ours.everything(), theirs.everything())


# ---- schedulers ----------------------------------------------------------------------------------


SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS),
}


@pytest.mark.parametrize("kind", [fastnn.optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_see_each_step(kind, scheduler):
    ours, theirs = small(kind), small(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        step = ours.step()
        schedulers = [SCHEDULERS[scheduler](training.optimizer) for training in (ours, theirs)]
        for index in range(STEPS - 1):
            assert same(call(step, index), loop(theirs, index))
            for one in schedulers:
                one.step()
            groups = ours.optimizer.param_groups, theirs.optimizer.param_groups
            assert [group["lr"] for group in groups[0]] == [group["lr"] for group in groups[1]]
    assert same(ours.everything(), theirs.everything())
    assert groups[0][0]["lr"] != 0.05


# ---- accumulation --------------------------------------------------------------------------------


def test_gradients_add_up_between_updates():
    ours, theirs = small(accumulate=3), small(accumulate=3)
    step = ours.step()
    call(step, 0), loop(theirs, 0)
    sums = [param.grad for param in ours.model.parameters()]
    assert all(total is not None for total in sums)
    call(step, 1), loop(theirs, 1)
    assert same(ours.everything(), theirs.everything())
    # The tensors are the same objects, as in the loop.
    params = ours.model.parameters()
    assert all(param.grad is total for param, total in zip(params, sums, strict=True))
    call(step, 2)
    assert all(param.grad is None for param in ours.model.parameters())


def test_the_loss_is_the_batch_s_own():
    whole, part = small().step(), small(accumulate=4).step()
    assert same(call(whole, 0), call(part, 0))


def test_flush_updates_with_what_there_is():
    ours, theirs = small(accumulate=3, clip_grad_norm=0.1), small(accumulate=3)
    step = ours.step()
    for index in range(2):
        call(step, index), loop(theirs, index)
    torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 0.1)
    theirs.optimizer.step()
    theirs.optimizer.zero_grad()
    step.flush()
    assert same(ours.everything(), theirs.everything())
    step.flush()  # nothing is accumulated
    assert same(ours.everything(), theirs.everything())
    # The next call starts over: an update takes three.
    before = ours.everything()["parameters"]
    call(step, 3), call(step, 4)
    assert same(ours.everything()["parameters"], before)
    call(step, 5)
    assert not same(ours.everything()["parameters"], before)


def test_gradients_from_before_are_dropped_at_first():
    ours, theirs = small(accumulate=2), small(accumulate=2)
    for param in ours.model.parameters():
        param.grad = torch.ones_like(param)
    call(ours.step(), 0), loop(theirs, 0)
    assert same(ours.everything(), theirs.everything())


# ---- what is called ------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.linear(x) * scale


@pytest.mark.parametrize("pack", [tuple, list, lambda pair: {"x": pair[0], "scale": pair[1]}])
def test_tuples_and_dicts_are_unpacked(pack):
    x, target = torch.randn(4, 3), torch.randn(4, 2)
    models = [TwoInputs(), TwoInputs()]
    models[1].load_state_dict(models[0].state_dict())
    steps = [
        fastnn.train_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
        for model in models
    ]
    loss = steps[0](pack([x, torch.tensor(2.0)]), target)
    assert same(loss, F.mse_loss(models[1](x, 2.0), target).detach())


def test_the_target_is_passed_as_it_is():
    seen = []

    def loss_fn(output: Tensor, target: object) -> Tensor:
        seen.append(target)
        return output.sum()

    model, target = nn.Linear(3, 2), {"boxes": (1, 2)}
    step = fastnn.train_step(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1))
    step(torch.randn(4, 3), target)
    assert seen == [target] and seen[0] is target


def test_hooks_run_as_in_the_loop():
    seen: dict[str, list[str]] = {"ours": [], "theirs": []}
    for name, training in (("ours", small()), ("theirs", small())):
        note = seen[name].append
        model, optimizer = training.model, training.optimizer
        model[0].register_forward_pre_hook(lambda *_, note=note: note("before"))
        model[0].register_forward_hook(lambda *_, note=note: note("after"))
        model[4].register_full_backward_hook(lambda *_, note=note: note("backward"))
        model[0].weight.register_hook(lambda grad, note=note: note("gradient"))
        model[0].weight.register_post_accumulate_grad_hook(
            lambda param, note=note: note(str(param.grad.norm().item()))
        )
        optimizer.register_step_pre_hook(lambda *_, note=note: note("before the step"))
        optimizer.register_step_post_hook(lambda *_, note=note: note("after the step"))
        step = training.step()
        for index in range(2):
            call(step, index) if name == "ours" else loop(training, index)
    assert seen["ours"] == seen["theirs"]
    assert len(seen["ours"]) == 14


def test_a_hook_sees_the_sum_of_gradients_as_in_the_loop():
    seen: list[list[Tensor]] = [[], []]
    trainings = small(accumulate=2), small(accumulate=2)
    for training, sums in zip(trainings, seen, strict=True):
        training.model[0].weight.register_post_accumulate_grad_hook(
            lambda param, sums=sums: sums.append(param.grad.clone())
        )
    step = trainings[0].step()
    for index in range(4):
        call(step, index), loop(trainings[1], index)
    assert same(*seen)


def test_parameters_outside_of_the_optimizer_keep_their_gradients():
    """The loop does the same: zero_grad is the optimizer's."""
    trainings = small(), small()
    for training in trainings:
        training.optimizer = torch.optim.SGD(training.model[4].parameters(), lr=0.1)
    step = trainings[0].step()
    for index in range(3):
        call(step, index), loop(trainings[1], index)
    assert trainings[0].model[0].weight.grad is not None
    assert same(trainings[0].everything(), trainings[1].everything())


def test_a_loss_with_parameters_and_buffers():
    class Centers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centers = nn.Parameter(torch.ones(CLASSES))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return (output - self.centers).pow(2).mean()

    trainings = small(), small()
    for training in trainings:
        training.loss_fn = Centers()
        training.optimizer.add_param_group({"params": training.loss_fn.parameters()})
    step = trainings[0].step()
    for index in range(3):
        assert same(call(step, index), loop(trainings[1], index))
    assert same(trainings[0].everything(), trainings[1].everything())
    assert trainings[0].loss_fn.calls == 3


# ---- modes ---------------------------------------------------------------------------------------


def test_under_no_grad():
    ours, theirs = small(), small()
    with torch.no_grad():
        loss = call(ours.step(), 0)
        assert not torch.is_grad_enabled()
    assert same(loss, loop(theirs, 0))
    assert same(ours.everything(), theirs.everything())
    assert not loss.requires_grad


def test_inference_mode_is_refused():
    training = small()
    step, before = training.step(), training.everything()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside of torch\.inference"):
        step(*batch(0))
    assert same(training.everything(), before)


def test_under_autocast_as_in_a_loop_whose_autocast_ends_before_the_backward():
    ours, theirs = small(), small()
    step = ours.step()
    with torch.autocast("cpu", torch.bfloat16):  # around all calls: cached casts go stale
        losses = [call(step, index) for index in range(3)]
    for index, loss in enumerate(losses):
        torch.manual_seed(index)
        input, target = batch(index)
        with torch.autocast("cpu", torch.bfloat16):
            expected = theirs.loss_fn(theirs.model(input), target)
        expected.backward()
        theirs.optimizer.step()
        theirs.optimizer.zero_grad()
        assert same(loss, expected.detach())
    assert same(ours.everything(), theirs.everything())


def test_autocast_is_off_in_backward_and_step():
    training, seen = small(), []

    def note(*_: object) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))

    training.model.register_forward_hook(note)
    training.model[0].weight.register_hook(note)
    training.optimizer.register_step_pre_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        call(training.step(), 0)
        note()
    assert seen == [True, False, False, True]


def test_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
        step = fastnn.train_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
        assert step(torch.randn(4, 3), torch.randn(4, 2)).shape == ()


# ---- models of other makes -----------------------------------------------------------------------


def test_a_compiled_model(fresh_dynamo):
    ours, theirs = small(), small()
    step = fastnn.train_step(
        torch.compile(ours.model, backend="eager"), ours.loss_fn, ours.optimizer
    )
    compiled = torch.compile(theirs.model, backend="eager")
    for index in range(3):
        loss = call(step, index)
        torch.manual_seed(index)
        input, target = batch(index)
        expected = theirs.loss_fn(compiled(input), target)
        theirs.optimizer.zero_grad()
        expected.backward()
        theirs.optimizer.step()
        theirs.optimizer.zero_grad()
        assert same(loss, expected.detach())
    assert same(ours.everything(), theirs.everything())


def test_a_scripted_model():
    ours, theirs = small(), small()
    for training in (ours, theirs):
        training.model = torch.jit.script(training.model)
    step = ours.step()
    for index in range(3):
        assert same(call(step, index), loop(theirs, index))
    before = ours.everything()
    with pytest.raises(IndexError):
        step(batch(0)[0], torch.full((4,), CLASSES))
    assert same(ours.everything(), before)


def test_a_lazy_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fastnn.train_step(model, F.cross_entropy, optimizer)
    step(*batch(0))
    before = everything(model, optimizer)
    assert before["buffers"]["1.num_batches_tracked"] == 1
    with pytest.raises(IndexError):
        step(batch(0)[0], torch.full((4,), CLASSES))
    assert same(everything(model, optimizer), before)


# ---- copies --------------------------------------------------------------------------------------


COPIES = [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_trains_its_own_model(copied):
    ours, theirs = small(accumulate=2), small(accumulate=2)
    step = ours.step()
    for index in range(4):
        call(step, index), loop(theirs, index)
    before = ours.everything()
    twin = copied(step)
    for index in range(4, 6):
        assert same(call(twin, index), loop(theirs, index))
    assert same(ours.everything(), before)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_begins_with_nothing_accumulated(copied):
    ours = small(accumulate=2)
    step = ours.step()
    call(step, 0)
    twin = copied(step)
    call(twin, 1)
    call(step, 1)
    assert all(param.grad is None for param in ours.model.parameters())
    program = twin.__getstate__()["program"]
    assert all(param.grad is not None for param in program.model.parameters())


# ---- arguments -----------------------------------------------------------------------------------


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


MODEL = nn.Linear(2, 2)
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)
BAD = [
    ({"model": lambda x: x}, TypeError, r"model: expected a torch\.nn\.Module, got function"),
    ({"loss_fn": "mse"}, TypeError, "loss_fn: expected a function or a module, got str"),
    ({"optimizer": MODEL}, TypeError, r"optimizer: expected a torch\.optim\.Optimizer, got Linear"),
    ({"optimizer": torch.optim.SGD}, TypeError, "optimizer: expected .* got type"),
    (
        {"optimizer": torch.optim.LBFGS(MODEL.parameters())},
        TypeError,
        "optimizer: expected one whose step needs no closure, got LBFGS",
    ),
    (
        {"optimizer": NeedsClosure(MODEL.parameters(), lr=0.1)},
        TypeError,
        "optimizer: .* got NeedsClosure",
    ),
    *(
        ({"accumulate": value}, ValueError, "accumulate: expected a positive integer, got ")
        for value in (0, -1, 1.5, "2", None, True)
    ),
    *(
        ({"clip_grad_norm": value}, ValueError, "clip_grad_norm: expected a number above 0, got ")
        for value in (0, -1.0, float("nan"), "1", True, [])
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments(bad, error, message):
    arguments = {"model": MODEL, "loss_fn": F.mse_loss, "optimizer": SGD} | bad
    with pytest.raises(error, match=message):
        fastnn.train_step(**arguments)


def test_other_numbers_are_taken():
    np = pytest.importorskip("numpy")
    fastnn.train_step(MODEL, F.mse_loss, SGD, accumulate=np.int64(2), clip_grad_norm=np.float32(1))
    fastnn.train_step(MODEL, F.mse_loss, SGD, clip_grad_norm=torch.tensor(0.5))
    fastnn.train_step(MODEL, F.mse_loss, SGD, clip_grad_norm=float("inf"))


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_says_which_way_and_why():
    step = small().step()
    report = step.report()
    assert report.way == "ordinary"
    assert report.reasons == {
        "fused": "the test leaves it out",
        "CUDA graph": "parameters are not on a GPU",
    }
    call(step, 0)
    assert step.report() == report
    assert str(report) == (
        "way         runs  reason\n"
        "fused       no    the test leaves it out\n"
        "CUDA graph  no    parameters are not on a GPU\n"
        "ordinary    yes"
    )


def test_the_class_of_a_loss_is_no_loss():
    model = nn.Linear(2, 2)
    optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="got the class CrossEntropyLoss; call it"):
        fastnn.train_step(model, nn.CrossEntropyLoss, optimizer)
