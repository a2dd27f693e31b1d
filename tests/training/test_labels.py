"""Training with labels: what the network is told, the null class, exact resumption, and what a model learns of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from ddim.data.dataset import CachedImageDataset
from ddim.data.labels import ImageLabels
from ddim.data.loader import Batches
from ddim.distributed import ProcessGroup
from ddim.io.class_labels import ClassLabels, grid_of_classes
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.training.config import TrainConfig, load_config, validate
from ddim.training.costs import estimate_costs, memory_bytes
from ddim.training.finetuning import CLASS_WEIGHT
from ddim.training.run import complete_config, train
from ddim.training.trainer import Trainer, build_model
from ddim.unet import UNet2DModel
from digits import TINY_MODEL

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")
NAMES = ("bright", "dark", "gray")
LEVELS = (230, 20, 128)


def shades(count: int) -> tuple[Tensor, Tensor]:
    """Images of three classes of brightness, uint8 (N, 1, 8, 8), and their classes."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, count)
    pixels = np.array(LEVELS)[classes][:, None, None, None] + random.integers(-10, 11, (count, 1, 8, 8))
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(classes)


def labeled(count: int = 40, names: tuple[str, ...] = NAMES) -> CachedImageDataset:
    pixels, classes = shades(count)
    return CachedImageDataset(pixels, labels=ImageLabels(names, classes, "label"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in a folder for each class."""
    path = tmp_path_factory.mktemp("shades")
    pixels, classes = shades(40)
    for number, (image, label) in enumerate(zip(pixels[:, 0].numpy(), classes.tolist(), strict=True)):
        (path / NAMES[label]).mkdir(exist_ok=True)
        Image.fromarray(image).save(path / NAMES[label] / f"{number:02}.png")
    return path


def labels_of_steps(trainer: Trainer, steps: int) -> Tensor:
    """The labels that the network gets in the first steps of a trainer."""
    told: list[Tensor] = []
    hook = trainer.model.register_forward_hook(lambda module, arguments, output: told.append(arguments[2].clone()))
    for _ in range(steps):
        trainer.take_step()
    hook.remove()
    return torch.cat(told)


# --- what the network is told


def test_network_is_told_the_classes_of_its_images(make_config: MakeConfig, tmp_path: Path) -> None:
    told = []
    for accumulate in (1, 2):
        config = make_config(objective={"class_dropout": 0}, optim={"accumulate": accumulate})
        trainer = Trainer(config, labeled(), tmp_path, CPU)
        images = torch.cat([trainer.batches[step] for step in range(6)])
        expected = torch.tensor(
            [int(np.abs(np.array(LEVELS) - image.float().mean().item()).argmin()) for image in images]
        )
        told.append(labels_of_steps(trainer, 6))
        assert torch.equal(told[-1], expected)
        assert not trainer.classes.has_null  # type: ignore[union-attr]
    assert torch.equal(*told)


def test_dropped_labels_are_a_function_of_seed_and_step(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(objective={"class_dropout": 0.25}, batch_size=16)
    trainer = Trainer(config, labeled(), tmp_path, CPU)
    labels = torch.arange(16) % 3
    dropped = torch.stack([trainer.drop_labels(labels, step) for step in range(500)])
    is_null = dropped == 3
    # 8000 labels, each dropped with probability 1/4: within four standard deviations.
    assert abs(is_null.double().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 8000) ** 0.5
    assert torch.equal(dropped[~is_null], labels.expand(500, 16)[~is_null])
    assert len({tuple(row.tolist()) for row in is_null}) > 400
    assert torch.equal(trainer.drop_labels(labels, 7), dropped[7])
    other = Trainer(config.model_copy(update={"seed": 1}), labeled(), tmp_path, CPU)
    assert not torch.equal(torch.stack([other.drop_labels(labels, step) for step in range(9)]), dropped[:9])
    # Each of two processes drops its part of the same labels.
    parts = []
    for rank in (0, 1):
        trainer.batches = Batches(labeled(), torch.arange(40), 16, 0, 8, processes=ProcessGroup(rank, 2))
        parts.append(trainer.drop_labels(labels[trainer.batches.local], 7))
    assert torch.equal(torch.cat(parts), dropped[7])


def test_labels_leave_other_numbers_as_they_are(make_config: MakeConfig, tmp_path: Path) -> None:
    pixels, _ = shades(40)
    inputs = []
    for dataset in (CachedImageDataset(pixels), labeled()):
        trainer, noisy = Trainer(make_config(), dataset, tmp_path, CPU), list[Tensor]()
        trainer.model.register_forward_hook(lambda module, arguments, output, noisy=noisy: noisy.append(arguments[0]))
        trainer.take_step()
        inputs.append(torch.cat(noisy))
    assert torch.equal(*inputs)


# --- runs


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("unet/diffusion_pytorch_model.safetensors", "optimizer.safetensors", "averages.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("balanced", [False, True])
def test_resumed_run_equals_uninterrupted_one(
    make_config: MakeConfig, folder: Path, tmp_path: Path, balanced: bool
) -> None:
    data = {"source": str(folder), "labels": "auto", "balanced": balanced, "holdout": 4, "on_device": balanced}
    checkpoints = {"every": 3}
    config = make_config(data=data, checkpoints=checkpoints, max_steps=6)
    train(config, tmp_path / "whole", "cpu")
    train(make_config(data=data, checkpoints=checkpoints, max_steps=3), tmp_path / "parts", "cpu")
    train(config, tmp_path / "parts", "cpu")
    whole, parts = (files_of(tmp_path / run / "checkpoints/step-00000006") for run in ("whole", "parts"))
    assert whole == parts


def test_result_and_checkpoints_have_the_classes(make_config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    config = make_config(
        data={"source": str(folder), "labels": "auto", "holdout": 5},
        max_steps=2,
        samples={"every": 1, "count": 12},
        evaluate={"every": 2, "count": 7, "num_inference_steps": 1},
    )
    final = train(config, tmp_path, "cpu")
    for place in (final, tmp_path / "checkpoints/step-00000002"):
        assert DDIMPipeline.from_pretrained(place).classes == ClassLabels(3, NAMES, has_null=True)
    # A row per class.
    assert Image.open(tmp_path / "samples/step-00000001.png").size == (4 * 10 + 2, 3 * 10 + 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_loss", "frechet_distance"} <= {name for line in lines for name in line}
    record = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert record["data"]["labels"]["classes"] == list(NAMES)
    card = (final / "README.md").read_text()
    assert "bright, dark, gray" in card
    assert "class_labels=" in card


def test_training_without_a_null_class(make_config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    config = make_config(
        data={"source": str(folder), "labels": "folder"},
        objective={"class_dropout": 0},
        max_steps=1,
        evaluate={"every": 1, "count": 5, "num_inference_steps": 1},
    )
    assert DDIMPipeline.from_pretrained(train(config, tmp_path, "cpu")).classes == ClassLabels(3, NAMES)


def test_other_labels_do_not_resume(make_config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    config = make_config(data={"source": str(folder), "labels": "auto"}, max_steps=1)
    train(config, tmp_path / "run", "cpu")
    with pytest.raises(
        ValueError, match=r"data: expected 40 images \(.*\), 3 classes \(.*\), got 40 images \([^)]*\)\)"
    ):
        train(make_config(data={"source": str(folder)}, max_steps=2), tmp_path / "run", "cpu")
    # The name of the column may change.
    train(make_config(data={"source": str(folder), "labels": "folder"}, max_steps=2), tmp_path / "run", "cpu")


def test_a_changed_label_does_not_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    pixels, classes = shades(20)
    for name, changed in (("first", classes), ("second", classes.roll(1))):
        np.savez(tmp_path / name, images=pixels[:, 0].numpy(), label=changed.numpy())
    first, second = (
        make_config(data={"source": f"{tmp_path}/{name}.npz", "labels": "auto"}, max_steps=1)
        for name in ("first", "second")
    )
    train(first, tmp_path / "run", "cpu")
    with pytest.raises(ValueError, match="has another configuration"):
        train(second, tmp_path / "run", "cpu")


def test_costs_count_the_classes(make_config: MakeConfig, folder: Path) -> None:
    plain, with_labels = (
        estimate_costs(make_config(data={"source": str(folder), "labels": labels}), "cpu")
        for labels in ("none", "auto")
    )
    rows = 4 * 4 * make_config().model["block_out_channels"][0]
    assert with_labels.parameters - plain.parameters == rows
    config = make_config()
    assert memory_bytes(config, 2, {"num_class_embeds": 4}) - memory_bytes(config, 2) >= 4 * rows


# --- what a model learns


def test_classes_are_learned(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        scheduler={"prediction_type": "v_prediction"},
        batch_size=32,
        max_steps=250,
        optim={"lr": 1e-2, "warmup_steps": 10, "decay": "linear"},
        ema={"decay": 0.95},
    )
    trainer = Trainer(config, labeled(90), tmp_path, CPU)
    for _ in range(250):
        trainer.take_step()
    pipe = DDIMPipeline(trainer.ema, trainer.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def brightness(count: int, **arguments: Any) -> np.ndarray:
        images = pipe(count, seeds=range(count), num_inference_steps=10, output_type="np", **arguments).images
        return 255 * np.asarray(images).mean((1, 2, 3))

    for label, level in zip(NAMES, LEVELS, strict=True):
        assert np.abs(brightness(4, class_labels=label) - level).max() < 35, label
    # The null class has images of all classes.
    values = brightness(24)
    assert values.max() - values.min() > 120


# --- fine-tuning


def saved(folder: Path, **classes: Any) -> tuple[str, dict[str, Tensor]]:
    torch.manual_seed(3)
    unet = UNet2DModel(**TINY_MODEL, **classes)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return str(folder), unet.state_dict()


def configured(init: str, **data: Any) -> TrainConfig:
    return complete_config(validate({"data": {"source": "x"} | data, "init": init, "model": {"sample_size": 8}}))


def test_new_classes_leave_an_unconditional_model_as_it_was(tmp_path: Path) -> None:
    name, weights = saved(tmp_path / "plain")
    model = build_model(configured(name), labels=ImageLabels(("a", "b"), torch.tensor([0, 1]), "label"))
    x = torch.randn(2, 1, 8, 8)
    expected = DDIMPipeline.from_pretrained(name).unet(x, 5).sample
    torch.testing.assert_close(model(x, 5, torch.tensor([0, 2])).sample, expected)
    assert not model.state_dict()[CLASS_WEIGHT].any()
    assert torch.equal(model.conv_in.weight, weights["conv_in.weight"])


@pytest.mark.parametrize("has_null", [False, True])
def test_classes_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture, has_null: bool) -> None:
    caplog.set_level("INFO", "ddim.training")
    name, weights = saved(
        tmp_path, num_class_embeds=3 + has_null, class_names=("cat", "dog", "frog"), has_null_class=has_null
    )
    labels = ImageLabels(("ant", "frog", "cat"), torch.tensor([0, 1, 2]), "label")
    table = build_model(configured(name), labels=labels).state_dict()[CLASS_WEIGHT]
    trained = weights[CLASS_WEIGHT]
    rest = trained[3] if has_null else trained.mean(0)
    assert torch.equal(table, torch.stack([rest, trained[2], trained[0], rest]))
    assert f"{name} does not have the classes ant: their embeddings are new" in caplog.text


def test_labels_are_required_to_fine_tune_a_model_with_classes(tmp_path: Path) -> None:
    name, _ = saved(tmp_path, num_class_embeds=3)
    with pytest.raises(ValueError, match=r"do not fit the model: it has 3 classes, and data\.labels is none; use auto"):
        build_model(configured(name))


def test_other_conditions_are_not_trained(tmp_path: Path) -> None:
    name, _ = saved(tmp_path, class_embed_type="timestep")
    with pytest.raises(ValueError, match=r"^init: training does not support class_embed_type=timestep, which .* has$"):
        configured(name)


# --- configurations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.num_class_embeds=10"],
            r"model\.num_class_embeds: is not an entry; the data, and data\.labels, decide it",
        ),
        (["model.class_names=[a]"], r"model\.class_names: is not an entry"),
        (["data.balanced=true"], r"data\.balanced: requires data\.labels: auto, or a column, got none"),
        (["objective.class_dropout=1"], r"objective\.class_dropout: must be less than 1, got 1"),
        (["data.labels=[a]"], r"data\.labels: must be a valid string, got \['a'\]"),
        (["data.label=auto"], r"data\.label: is not an entry \(did you mean data\.labels\?\)"),
    ],
)
def test_wrong_entries_raise(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("digits", settings=settings)


def test_grid_of_classes() -> None:
    assert grid_of_classes(64, 10) == (10, 6)
    assert grid_of_classes(4, 10) == (2, 2)
    assert grid_of_classes(64, 64) == (64, 1)
