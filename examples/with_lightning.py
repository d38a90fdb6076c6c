"""Lightning: an MLP fused inside a LightningModule, SGD with a one-cycle schedule.

python examples/with_lightning.py
"""

from __future__ import annotations

import lightning
import torch
from digits import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastnn


class Classifier(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.model = fastnn.fuse(
            nn.Sequential(
                nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
            )
        )
        self.loss_fn = fastnn.nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = self.loss_fn(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = fastnn.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(precision: str = "32-true") -> tuple[nn.Module, list[float]]:
    """Returns the model and the loss of each step."""
    lightning.seed_everything(0, verbose=False)
    digits, _ = load_digits(None)
    dataset = TensorDataset(digits.images, digits.labels)
    loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)
    classifier = Classifier(steps=len(loader))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, loader)
    return classifier, classifier.losses


def main() -> None:
    for precision in ("32-true", "bf16-mixed"):
        _, losses = train(precision)
        print(f"{precision}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} in the end")


if __name__ == "__main__":
    main()
