"""Hugging Face: Trainer on a small Llama, whose last layer and loss are one operator.

python examples/with_transformers_head.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import fastnn

WORDS = 1024


def sentences(count: int) -> list[Tensor]:
    """Each word is followed by the next of the vocabulary."""
    return [*(torch.randint(WORDS, (count, 1)) + torch.arange(16)) % WORDS]


def collate(rows: list[Tensor]) -> dict[str, Any]:
    """What the model is called with; it is to give what lies before its head, and few logits."""
    words = torch.stack(rows)
    options = {"output_hidden_states": True, "logits_to_keep": 1}
    return {"input_ids": words, "labels": words, **options}


def build_trainer(folder: Path, **more) -> Trainer:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)

    def loss_of(outputs, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """The mean over the words of a step, however many batches it has."""
        return fastnn.functional.linear_cross_entropy(
            outputs.hidden_states[-1][:, :-1],
            model.lm_head.weight,
            labels[:, 1:],
            normalizer=num_items_in_batch,
        )

    arguments = {
        "output_dir": str(folder),
        "max_steps": 30,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments | more),
        data_collator=collate,
        train_dataset=sentences(2048),
        optimizer_cls_and_kwargs=(fastnn.optim.SGD, {"lr": 2.0, "momentum": 0.9}),
        compute_loss_func=loss_of,
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    with TemporaryDirectory() as folder:
        trainer = build_trainer(folder)
        trainer.train()
        losses = losses_of(trainer)
        print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} in the end")


if __name__ == "__main__":
    main()
