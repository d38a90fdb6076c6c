"""Hugging Face: Trainer with resume, saved models, accelerate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import fastnn
from fastnn._backend import fastnn as fastnn_backend
from support.examples import (
    STOCK,
    assert_learns_as_stock,
    assert_trained_alike,
    copy_of_state,
    fused_paths,
    load,
)

program = load("with_transformers")


PAIRS = [f"bert.encoder.layer.{layer}.intermediate.dense" for layer in range(2)]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def fused_trainer(folder: Path, **more) -> Trainer:
    trainer = program.build_trainer(folder, **more)
    assert fused_paths(trainer.model) == PAIRS
    return trainer


def test_the_program_learns_as_stock(tmp_path, monkeypatch):
    trainer = fused_trainer(tmp_path)
    trainer.train()
    monkeypatch.setattr(program, "fastnn", STOCK)
    stock = program.build_trainer(tmp_path)
    stock.train()
    assert_learns_as_stock(program.losses_of(trainer), program.losses_of(stock))


def test_resumed_training_ends_where_uninterrupted_training_does(tmp_path):
    whole = fused_trainer(tmp_path, max_steps=20, save_steps=10)
    whole.train()
    resumed = fused_trainer(tmp_path, max_steps=20, save_steps=10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.state.global_step == 20
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_bfloat16(tmp_path):
    trainer = fused_trainer(tmp_path, max_steps=20, bf16=True)
    seen = set()
    layer = trainer.model.get_submodule(PAIRS[0].rpartition(".")[0])
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_a_fused_model_is_saved_as_a_stock_one(tmp_path):
    trainer = fused_trainer(tmp_path)
    trainer.save_model(tmp_path / "saved")
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    words = program.Sentences(8).words
    ours = trainer.model.eval()
    assert type(stock.get_submodule(PAIRS[0])) is nn.Linear
    torch.testing.assert_close(ours(words).logits, stock(words).logits, rtol=1e-5, atol=1e-6)


def test_t5():
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    stock = T5ForConditionalGeneration(config).double()
    start = copy_of_state(stock)
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == [
        f"{path}.DenseReluDense.wi"
        for path in (
            *(f"encoder.block.{layer}.layer.1" for layer in range(2)),
            *(f"decoder.block.{layer}.layer.2" for layer in range(2)),
        )
    ]
    fused = copy.deepcopy(fused)
    assert_trained_by_both_alike(fused, stock, start)


def test_opt_compiled():
    """fuse can't handle its layer's long, decorated forward; the compiler can."""
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        dropout=0.0,
    )
    stock = OPTForCausalLM(config)  # its loss always uses float32 logits
    start = copy_of_state(stock)
    names = []

    def recording(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        function = fastnn_backend(graph_module, inputs)
        names.extend(getattr(node.target, "__name__", "") for node in graph_module.graph.nodes)
        return function

    ours = torch.compile(copy.deepcopy(stock), backend=recording)
    assert_trained_by_both_alike(ours, stock, start)
    assert names.count("linear_relu") >= 2
    assert "cross_entropy" in names


def assert_trained_by_both_alike(
    ours: nn.Module, stock: nn.Module, start: dict[str, torch.Tensor]
) -> None:
    words = torch.randint(2, 64, (4, 12))
    for model, sgd in ((stock, torch.optim.SGD), (ours, fastnn.optim.SGD)):
        optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=words, labels=words).loss.backward()
            optimizer.step()
    assert_trained_alike(getattr(ours, "_orig_mod", ours), stock, start)


def test_accelerate():
    x = torch.randn(64, 8, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    stock = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    start = copy_of_state(stock)
    fused = fastnn.fuse(copy.deepcopy(stock), inplace=True)
    for model, sgd, loss_fn in (
        (stock, torch.optim.SGD, nn.CrossEntropyLoss()),
        (fused, fastnn.optim.SGD, fastnn.nn.CrossEntropyLoss()),
    ):
        accelerator = Accelerator(cpu=True)
        optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9)
        prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader)
        for inputs, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(prepared(inputs), labels))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
    assert_trained_alike(fused, stock, start)


def test_the_program_runs(capsys):
    program.main()
    assert "in the end" in capsys.readouterr().out
