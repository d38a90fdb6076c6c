"""Several things at a time in Python: workers, forks, threads, shared memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.synchronize import Semaphore

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader, Dataset

import fastnn
from support import processes
from support.capabilities import COLUMNS
from support.small_training import SIZES, STEPS, make_model, make_optimizer, train

pytestmark = pytest.mark.cpu_only("processes and threads of Python, whatever the kernels")

WIDTH = 256  # makes every operator of the training below use two threads

USED = ["linear_relu", "cross_entropy", "SGD"]  # by the trainings below

# On a GPU torch's backward uses threads, which a forked process doesn't inherit.
trains_in_a_fork = pytest.mark.skipif(
    torch.cuda.is_available(), reason="torch refuses to train in a fork where there is a GPU"
)


def wide_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(fastnn.nn.LinearReLU(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def train_wide(model: nn.Module) -> list[Tensor]:
    """The parameters after some steps."""
    generator = torch.Generator().manual_seed(0)
    criterion = fastnn.nn.CrossEntropyLoss()
    optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        inputs = torch.randn(WIDTH, WIDTH, generator=generator)
        optimizer.zero_grad()
        criterion(model(inputs), torch.arange(WIDTH)).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.fixture
def two_threads(restore_threads: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Makes Python's threads switch as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def assert_same_bits(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- data loaders ---------------------------------------------------------------------------------

SAMPLES = 12


class Features(Dataset):
    """Samples computed by a layer of ours."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layer = make_model()[0]
        self.raw = torch.randn(SAMPLES, SIZES[0], generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.layer(self.raw[index])


def collate(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    log_probs = fastnn.functional.log_softmax(torch.stack(samples), dim=1)
    targets = log_probs.argmin(dim=1)
    return log_probs, fastnn.functional.nll_loss(log_probs, targets, reduction="none")


@pytest.mark.capability(
    "processes", "`DataLoader` workers, forked and spawned", operators=[*COLUMNS]
)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_while_the_main_process_trains(method, two_threads):
    alone = train_wide(wide_model(0))  # also the first parallel region, before the fork
    loader = partial(DataLoader, Features(), batch_size=2, collate_fn=collate)
    workers = {"num_workers": 2, "multiprocessing_context": method, "timeout": processes.TIMEOUT}
    batches, trained = [], []
    for each in loader(**workers):
        trained.append(train_wide(wide_model(0)))
        batches.append(each)
    assert_same_bits(batches, list(loader()))
    assert_same_bits(trained, [alone] * len(batches))


# --- forks ----------------------------------------------------------------------------------------

# A forked process has none of its parent's threads. GNU OpenMP, torch's runtime on Linux, doesn't
# notice: its next parallel region waits for them forever, in torch's operators and in ours.


def train_wide_on(number: int, threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    return train_wide(wide_model(0))


def use_torch_on(number: int, threads: int) -> None:
    torch.set_num_threads(threads)
    wide = torch.ones(WIDTH, WIDTH, requires_grad=True)
    nn.functional.cross_entropy(wide @ wide, torch.arange(WIDTH)).backward()


@pytest.mark.capability("processes", "a fork after a parallel region, one thread", operators=USED)
@trains_in_a_fork
def test_forked_after_a_parallel_region_one_thread_trains(tmp_path, two_threads):
    expected = train_wide(wide_model(0))
    for trained in processes.run(tmp_path, 2, train_wide_on, 1, method="fork"):
        assert_same_bits(trained, expected)


@pytest.mark.capability(
    "processes", "a fork before any parallel region, several threads", operators=USED
)
def test_forked_before_any_parallel_region_two_threads_train(tmp_path, two_threads):
    expected = train_wide(wide_model(0))
    # Forked from a server, which computes nothing itself.
    (trained,) = processes.run(tmp_path, 1, train_wide_on, 2, method="forkserver")
    assert_same_bits(trained, expected)


@trains_in_a_fork
def test_forked_after_a_parallel_region_two_threads_train_where_torchs_do(tmp_path, two_threads):
    expected = train_wide(wide_model(0))
    for folder in ("torch", "ours"):
        (tmp_path / folder).mkdir()
    try:
        # A few milliseconds of work. A slower machine skips a test that could have run.
        processes.run(tmp_path / "torch", 1, use_torch_on, 2, method="fork", timeout=4)
    except AssertionError:
        pytest.skip("torch's own operators hang here: GNU OpenMP after a fork")
    (trained,) = processes.run(tmp_path / "ours", 1, train_wide_on, 2, method="fork")
    assert_same_bits(trained, expected)


# --- threads --------------------------------------------------------------------------------------

THREADS = 4


@pytest.mark.capability("processes", "several threads that train at once", operators=USED)
def test_threads_that_train_at_once_come_to_the_same_as_one_by_one(two_threads, eager_switches):
    together = threading.Barrier(THREADS, timeout=processes.TIMEOUT)

    def train_with_others(model: nn.Module) -> list[Tensor]:
        together.wait()
        return train_wide(model)

    # Made in advance, since the threads share torch's generator; each has its own model and data.
    one_by_one = [train_wide(wide_model(seed)) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        at_once = list(pool.map(train_with_others, map(wide_model, range(THREADS))))
    assert_same_bits(at_once, one_by_one)


# --- shared memory --------------------------------------------------------------------------------


def take_turns(number: int, model: nn.Module, turns: list[Semaphore]) -> None:
    """Takes every other step, with its own momentum, like a Hogwild process."""
    torch.set_num_threads(1)  # a forked process may use only one
    optimizer = make_optimizer(model.parameters())
    for step in range(number, STEPS, len(turns)):
        assert turns[number].acquire(timeout=processes.TIMEOUT)
        train(model, optimizer, steps=[step])
        turns[(number + 1) % len(turns)].release()


@pytest.mark.capability(
    "processes", "parameters shared by processes (`share_memory`)", operators=USED
)
@pytest.mark.parametrize("method", [pytest.param("fork", marks=trains_in_a_fork), "forkserver"])
def test_processes_train_shared_parameters_in_turns(tmp_path, method):
    shared = make_model().share_memory()
    context = multiprocessing.get_context(method)
    turns = [context.Semaphore(1), context.Semaphore(0)]
    processes.run(tmp_path, len(turns), take_turns, shared, turns, method=method)

    model = make_model()
    optimizers = [make_optimizer(model.parameters()) for _ in turns]
    for step in range(STEPS):
        train(model, optimizers[step % len(turns)], steps=[step])
    assert_same_bits(shared.state_dict(), model.state_dict())


# --- the runner of all these ----------------------------------------------------------------------


def fail(number: int) -> None:
    if number == 1:
        raise ValueError("planted")
    threading.Event().wait()


def test_a_process_that_raises_is_shown_and_ends_the_others(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)process 1 ended with 1.*ValueError: planted"):
        processes.run(tmp_path, 2, fail)


def hang(number: int) -> None:
    print("before", flush=True)
    threading.Event().wait()


def test_a_process_that_hangs_shows_where(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)before.*Timeout.*in hang"):
        processes.run(tmp_path, 1, hang, timeout=2)
