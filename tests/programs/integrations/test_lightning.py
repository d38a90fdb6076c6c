"""Lightning: precisions, ``step(closure)``, checkpoints, a LightningModule fused as a whole."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastnn
from support.examples import (
    STOCK,
    assert_learns_as_stock,
    assert_trained_alike,
    copy_of_state,
    fused_paths,
    load,
)

program = load("with_lightning")


class Plain(lightning.LightningModule):
    """A module written without fastnn in mind."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return self.loss_fn(self.model(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


class Fast(Plain):
    optimizer = fastnn.optim.SGD

    def __init__(self) -> None:
        super().__init__()
        fastnn.fuse(self, inplace=True)


class Manual(Fast):
    """Calls its optimizer itself, with a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.returned: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = super(Manual, self).training_step(batch, index)
            self.manual_backward(loss)
            return loss

        self.returned.append(optimizer.step(closure))


def batches(dtype: torch.dtype = torch.float64) -> DataLoader:
    x = torch.randn(64, 8, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)


def trainer(**more) -> lightning.Trainer:
    options = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "precision": "64-true",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**options | more)


def seeded(kind: type[Plain]) -> Plain:
    lightning.seed_everything(0, verbose=False)
    return kind().double()


# Lightning doesn't clip for a module that calls its optimizer itself.
@pytest.mark.parametrize(("kind", "clip"), [(Fast, None), (Fast, 0.05), (Manual, None)])
def test_a_module_fused_as_a_whole_trains_as_stock(kind, clip):
    ours, stock = seeded(kind), seeded(Plain)
    start = copy_of_state(stock)
    assert fused_paths(ours) == ["model.0"]
    for module in (ours, stock):
        trainer(gradient_clip_val=clip).fit(module, batches())
    assert_trained_alike(ours, stock, start)


def test_a_closure_s_loss_is_returned():
    module = seeded(Manual)
    trainer().fit(module, batches())
    assert len(module.returned) == 16
    assert all(loss.requires_grad for loss in module.returned)
    assert module.returned[-1] < module.returned[0]


def test_training_goes_on_from_a_checkpoint(tmp_path: Path):
    whole = seeded(Fast)
    trainer().fit(whole, batches())

    first = seeded(Fast)
    half = trainer(max_epochs=1)
    half.fit(first, batches())
    half.save_checkpoint(tmp_path / "half.ckpt")
    # Stock modules and SGD can load what fastnn's have saved, too.
    for kind in (Fast, Plain):
        resumed = seeded(kind)
        start = copy_of_state(resumed)
        trainer().fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
        assert_trained_alike(resumed, whole, start)


def test_autocast_reaches_the_fused_layers():
    fused = seeded(Fast).float()
    seen = []
    fused.model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    trainer(precision="bf16-mixed", max_steps=1).fit(fused, batches(torch.float32))
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float32}


# bfloat16 has 8 bits, so one unit in the last place is at most 0.8 %: ten losses are within a few.
@pytest.mark.parametrize(("precision", "rel"), [("32-true", 1e-3), ("bf16-mixed", 0.03)])
def test_the_program_learns_as_stock(precision, rel, monkeypatch):
    model, losses = program.train(precision)
    assert fused_paths(model) == ["model.0", "model.2"]
    monkeypatch.setattr(program, "fastnn", STOCK)
    assert_learns_as_stock(losses, program.train(precision)[1], rel)


def test_the_program_runs(capsys):
    program.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "32-true",
        "bf16-mixed",
    ]
