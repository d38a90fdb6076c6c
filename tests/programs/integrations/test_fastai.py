"""fastai: a learner with fastnn's loss, optimizer and fused head can do all that learners do."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.interpret import ClassificationInterpretation
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.tabular.all import (
    Categorify,
    CategoryBlock,
    FillMissing,
    Normalize,
    TabularDataLoaders,
    tabular_learner,
)
from fastai.vision.all import (
    Learner,
    SegmentationDataLoaders,
    accuracy,
    load_learner,
    resnet18,
    set_seed,
    unet_learner,
)
from PIL import Image

import fastnn
from support.examples import STOCK, fused_paths, load

program = load("with_fastai")

# fastai's own loss wraps PyTorch's.
STOCK_OF_FASTAI = SimpleNamespace(
    **vars(STOCK) | {"nn": SimpleNamespace(CrossEntropyLoss=CrossEntropyLossFlat)}
)

our_sgd = partial(OptimWrapper, opt=fastnn.optim.SGD, momentum=0.9)
stock_sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    program.write_pictures(folder, 40)
    return folder


@pytest.fixture
def learn(pictures) -> Learner:
    learn = program.build_learner(pictures)
    with learn.no_bar(), learn.no_logging():
        yield learn


@pytest.fixture
def stock(pictures, monkeypatch) -> Learner:
    monkeypatch.setattr(program, "fastnn", STOCK_OF_FASTAI)
    learn = program.build_learner(pictures)
    with learn.no_bar(), learn.no_logging():
        yield learn


def losses_of(learn: Learner) -> list[float]:
    return [float(loss) for loss in learn.recorder.losses]


def trained(learn: Learner, how: str, *arguments) -> Learner:
    set_seed(1, reproducible=True)
    getattr(learn, how)(*arguments)
    return learn


def assert_same_predictions(ours: Learner, stock: Learner) -> None:
    """Equal up to a few float32 roundings: the weights are the same and probabilities below 1."""
    stock.model.load_state_dict(ours.model.state_dict())
    options = {"with_loss": True, "with_decoded": True}
    for mine, theirs in zip(ours.get_preds(**options), stock.get_preds(**options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# --- vision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "arguments", "steps"),
    # The recorder keeps the second part of fine_tune, which trains all layers.
    [("fit_one_cycle", (2, 0.02), 4), ("fine_tune", (1, 0.02), 2)],
)
def test_trains_as_stock(learn, stock, how, arguments, steps):
    assert fused_paths(learn.model) == ["1.4"]
    losses = [losses_of(trained(learner, how, *arguments)) for learner in (learn, stock)]
    assert len(losses[0]) == len(losses[1]) == steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_predictions_are_stocks(learn, stock):
    trained(learn, "fit_one_cycle", 1, 0.02)
    assert_same_predictions(learn, stock)
    loss, accuracy = learn.validate()
    assert [loss, accuracy] == pytest.approx(list(stock.validate()), rel=1e-4)


def test_one_picture(learn, stock, pictures):
    stock.model.load_state_dict(learn.model.state_dict())
    mine, theirs = (learner.predict(pictures / "3_0.png") for learner in (learn, stock))
    assert mine[0] == theirs[0]
    assert mine[1] == theirs[1]
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-4, atol=1e-5)
    assert float(mine[2].sum()) == pytest.approx(1)


def test_lr_find(learn, stock):
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    losses = []
    for learner in (learn, stock):
        set_seed(1, reproducible=True)
        assert 1e-7 < learner.lr_find(num_it=20, show_plot=False).valley < 10
        losses.append(losses_of(learner))
    # The last steps have a large learning rate, which amplifies every rounding.
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-3)
    assert all(torch.equal(learn.model.state_dict()[name], before[name]) for name in before)


def test_to_fp16(learn, stock):
    """fastai's mixed precision is for CUDA; here its callback does nothing."""
    losses = [
        losses_of(trained(learner.to_fp16(), "fit_one_cycle", 1, 0.02))
        for learner in (learn, stock)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_mixup(learn, stock):
    """MixUp mixes class indices only if the loss says that it accepts them."""
    losses = []
    for learner in (learn, stock):
        learner.add_cb(MixUp())
        losses.append(losses_of(trained(learner, "fit_one_cycle", 1, 0.02)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_interpretation(learn, stock):
    stock.model.load_state_dict(learn.model.state_dict())
    mine, theirs = (
        ClassificationInterpretation.from_learner(learner) for learner in (learn, stock)
    )
    np.testing.assert_array_equal(mine.confusion_matrix(), theirs.confusion_matrix())
    torch.testing.assert_close(mine.top_losses(3)[0], theirs.top_losses(3)[0], rtol=1e-4, atol=1e-5)


def test_the_program_runs(capsys):
    program.main()
    assert "3_0.png is a" in capsys.readouterr().out


# --- export ---------------------------------------------------------------------------------------


def test_export_and_load(learn, pictures):
    trained(learn, "fit_one_cycle", 1, 0.02)
    learn.export("ours.pkl")
    again = load_learner(pictures / "ours.pkl")
    assert fused_paths(again.model) == ["1.4"]
    assert type(again.loss_func) is fastnn.nn.CrossEntropyLoss
    expected = learn.predict(pictures / "7_0.png")
    with again.no_bar():
        found = again.predict(pictures / "7_0.png")
    assert found[0] == expected[0]
    assert torch.equal(found[2], expected[2])


def packages_in(pickled: bytes) -> set[str]:
    """The packages that a pickle in torch.save's protocol imports from, ignoring other strings."""
    opcodes = pickletools.genops(pickled)
    names = [argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"]
    return {name.split()[0].split(".")[0] for name in names}


def test_packages_in_a_pickle():
    path = "/a/clone/named/fastnn"
    stock = packages_in(pickle.dumps([torch.nn.NLLLoss(), path], protocol=2))
    assert "torch" in stock and "fastnn" not in stock
    assert "fastnn" in packages_in(pickle.dumps([fastnn.nn.NLLLoss(), path], protocol=2))


def test_an_unfused_export_does_not_name_fastnn(learn, pictures):
    expected = learn.predict(pictures / "7_0.png")[2]
    learn.model = fastnn.unfuse(learn.model)
    learn.loss_func = CrossEntropyLossFlat()
    learn.opt_func = stock_sgd
    learn.export("stock.pkl")
    with zipfile.ZipFile(pictures / "stock.pkl") as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        assert "fastnn" not in packages_in(archive.read(pickled))
    again = load_learner(pictures / "stock.pkl")
    with again.no_bar():
        found = again.predict(pictures / "7_0.png")[2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- segmentation ---------------------------------------------------------------------------------


def mask_of(path: Path) -> Path:
    return path.parent / "masks" / path.name


def segmenter(folder: Path, loss_func) -> Learner:
    set_seed(0, reproducible=True)
    dls = SegmentationDataLoaders.from_label_func(
        folder,
        sorted(folder.glob("*.png")),
        mask_of,
        codes=["dark", "light"],
        bs=4,
        num_workers=0,
        seed=0,
    )
    return unet_learner(
        dls, resnet18, pretrained=False, n_out=2, loss_func=loss_func, opt_func=our_sgd
    )


def test_segmentation(tmp_path):
    """Logits (N, C, H, W) and a class for each pixel."""
    rng = np.random.default_rng(0)
    (tmp_path / "masks").mkdir()
    for index in range(8):
        picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
        Image.fromarray((picture[..., 0] > 127).astype(np.uint8)).save(
            mask_of(tmp_path / f"{index}.png")
        )
    ours = segmenter(tmp_path, fastnn.nn.CrossEntropyLoss())
    stock = segmenter(tmp_path, CrossEntropyLossFlat(axis=1))
    losses = []
    for learn in (ours, stock):
        with learn.no_bar(), learn.no_logging():
            losses.append(losses_of(trained(learn, "fit_one_cycle", 1, 0.01)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with ours.no_bar(), stock.no_bar():
        assert_same_predictions(ours, stock)
        assert ours.get_preds(with_decoded=True)[2].shape[1:] == (32, 32)


# --- tables ---------------------------------------------------------------------------------------


def passengers() -> pd.DataFrame:
    """A table like the Titanic's: survival depends on sex, class and age; some ages are missing."""
    rng = np.random.default_rng(0)
    count = 512
    table = pd.DataFrame(
        {
            "Pclass": rng.integers(1, 4, count),
            "Sex": rng.choice(["male", "female"], count),
            "Embarked": rng.choice(["C", "Q", "S"], count),
            "Age": rng.uniform(1, 80, count),
            "Fare": rng.lognormal(3, 1, count),
        }
    )
    odds = 2.5 * (table.Sex == "female") - table.Pclass - 0.02 * table.Age + 1.5
    table["Survived"] = (rng.logistic(size=count) < odds).astype(int)
    table.loc[rng.random(count) < 0.2, "Age"] = np.nan
    return table


def fused_loss() -> CrossEntropyLossFlat:
    """fastai's own loss with our operator: it converts a table's int8 targets to int64."""
    loss = CrossEntropyLossFlat()
    fastnn.fuse(loss.func, inplace=True)
    assert type(loss.func) is fastnn.nn.CrossEntropyLoss
    return loss


def table_learner(loss_func, sgd) -> Learner:
    set_seed(0, reproducible=True)
    table = passengers()
    dls = TabularDataLoaders.from_df(
        table,
        y_names="Survived",
        y_block=CategoryBlock(),
        cat_names=["Pclass", "Sex", "Embarked"],
        cont_names=["Age", "Fare"],
        procs=[Categorify, FillMissing, Normalize],
        valid_idx=list(range(384, 512)),
        bs=64,
    )
    return tabular_learner(dls, loss_func=loss_func, opt_func=sgd, metrics=accuracy)


def test_tables():
    ours = table_learner(fused_loss(), our_sgd)
    stock = table_learner(CrossEntropyLossFlat(), stock_sgd)
    ours.model = fastnn.fuse(ours.model)
    assert fused_paths(ours.model) == ["layers.0.0", "layers.1.0"]
    losses = []
    for learn in (ours, stock):
        with learn.no_bar(), learn.no_logging():
            losses.append(losses_of(trained(learn, "fit_one_cycle", 5, 0.05)))
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-3)
    with ours.no_bar(), stock.no_bar():
        assert ours.validate()[1] > 0.65  # about half of the passengers survive
        assert_same_predictions(ours, stock)
        row = passengers().iloc[0]
        mine, theirs = ours.predict(row), stock.predict(row)
    assert mine[1] == theirs[1]
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-4, atol=1e-5)


def test_autocast():
    """bfloat16 on the CPU; fastai's own callback requires CUDA."""
    learn = table_learner(fused_loss(), our_sgd)
    learn.model = fastnn.fuse(learn.model)
    seen = set()
    layer = learn.model.get_submodule("layers.1")
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with learn.no_bar(), learn.no_logging(), torch.autocast("cpu", torch.bfloat16):
        learn.fit_one_cycle(5, 0.05)
        assert learn.validate()[1] > 0.65
    assert seen == {torch.bfloat16}
