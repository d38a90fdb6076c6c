"""Hugging Face: Trainer on a small BERT with ReLU, whose feed-forward layers run fused.

python examples/with_transformers.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastnn

WORDS = 64


class Sentences(Dataset):
    """Sentences whose words all come from one half of the vocabulary; which half is the class."""

    def __init__(self, count: int) -> None:
        self.labels = torch.randint(2, (count,))
        self.words = torch.randint(WORDS // 2, (count, 12)) + self.labels[:, None] * (WORDS // 2)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def loss_of(outputs, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return fastnn.functional.cross_entropy(outputs.logits, labels)


def build_trainer(folder: Path, **more) -> Trainer:
    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        hidden_act="relu",
    )
    arguments = {
        "output_dir": str(folder),
        "max_steps": 40,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 20,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=fastnn.fuse(BertForSequenceClassification(config), verbose=True),
        args=TrainingArguments(**arguments | more),
        train_dataset=Sentences(1024),
        optimizer_cls_and_kwargs=(fastnn.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        compute_loss_func=loss_of,
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    with TemporaryDirectory() as folder:
        build_trainer(folder).train()
        # As after a crash: a new process would continue from the last checkpoint.
        trainer = build_trainer(folder)
        trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-20"))
        losses = losses_of(trainer)
        print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} in the end")


if __name__ == "__main__":
    main()
