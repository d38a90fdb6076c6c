"""Hugging Face's Trainer with a compute_loss_func that takes no logits."""

from __future__ import annotations

import pytest
from transformers import Trainer

from support.examples import assert_learns_as_stock, load

program = load("with_transformers_head")


@pytest.mark.parametrize("batches", [1, 2])
def test_the_loss_is_the_models_own(tmp_path, monkeypatch, batches):
    """Also where a step has several batches, over whose words the mean is taken."""
    options = {"gradient_accumulation_steps": batches}
    trainer = program.build_trainer(tmp_path, **options)
    trainer.train()
    monkeypatch.setattr(program, "Trainer", StockTrainer)
    monkeypatch.setattr(program, "collate", lambda rows: stock_batch(collate(rows)))
    stock = program.build_trainer(tmp_path, **options)
    stock.train()
    assert_learns_as_stock(program.losses_of(trainer), program.losses_of(stock))


collate = program.collate


def stock_batch(batch: dict[str, object]) -> dict[str, object]:
    return {name: batch[name] for name in ("input_ids", "labels")}


class StockTrainer(Trainer):
    """One that leaves the loss to the model."""

    def __init__(self, *, compute_loss_func: object, **more) -> None:
        super().__init__(**more)


def test_the_program_runs(capsys):
    program.main()
    assert "in the end" in capsys.readouterr().out
