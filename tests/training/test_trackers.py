"""Trackers, through the classes of `accelerate`: TensorBoard by its files in the tests of runs, the others by modules
with the functions of wandb and mlflow that are called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddim.training.config import TrainConfig
from ddim.training.run import train
from ddim.training.trackers import check_trackers
from helpers import file_names, read_jsonl

MakeConfig = Callable[..., TrainConfig]
RUN = {"max_steps": 4, "log_every": 2, "samples": {"every": 2}, "trackers": ["wandb", "mlflow"]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is called of wandb and mlflow, in order."""
    calls: list[tuple[Any, ...]] = []

    def record(name: str, result: Any = None) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, *args, kwargs))
            return result

        return function

    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    run = SimpleNamespace(log=record("wandb.log"), finish=record("wandb.finish"))
    wandb.init = record("wandb.init", run)  # type: ignore[attr-defined]
    wandb.config = SimpleNamespace(update=record("wandb.config.update"))  # type: ignore[attr-defined]
    wandb.Image = lambda image: image  # type: ignore[attr-defined]
    for name in ("start_run", "log_metrics", "log_params", "log_artifact", "end_run", "create_experiment"):
        setattr(mlflow, name, record(f"mlflow.{name}"))
    mlflow.search_experiments = lambda **_: []  # type: ignore[attr-defined]
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    mlflow.utils = SimpleNamespace(validation=limits)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def named(calls: list[tuple[Any, ...]], name: str) -> list[tuple[Any, ...]]:
    return [call[1:] for call in calls if call[0] == name]


def test_runs_are_logged_to_all_trackers(
    make_config: MakeConfig, tmp_path: Path, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    out = tmp_path / "faces"
    train(make_config(**RUN), out, "cpu")
    assert not (out / "tensorboard").exists()
    assert named(calls, "wandb.init") == [({"project": "mine", "name": "faces", "dir": str(out)},)]
    assert named(calls, "mlflow.create_experiment")[0][0]["name"] == "ddim"
    assert named(calls, "mlflow.start_run")[0][0]["run_name"] == "faces"
    for name in ("wandb.config.update", "mlflow.log_params"):
        entries = named(calls, name)[0][0]
        assert (entries["max_steps"], entries["optim.lr"], entries["model.block_out_channels"]) == (4, 2e-3, "[8]")
    lines = read_jsonl(out / "metrics.jsonl")
    logged = {name: named(calls, name) for name in ("wandb.log", "mlflow.log_metrics")}
    for rows in logged.values():
        losses = [(kwargs["step"], values) for values, kwargs in rows if "loss" in values]
        assert [(step, values["loss"], values["grad_norm"]) for step, values in losses] == [
            (line["step"], line["loss"], line["grad_norm"]) for line in lines
        ]
        assert all(isinstance(value, float) for _, values in losses for value in values.values())
    # Grids, as images and as the files.
    images = [(kwargs["step"], values["samples"]) for values, kwargs in logged["wandb.log"] if "samples" in values]
    files = [Path(kwargs["local_path"]) for (kwargs,) in named(calls, "mlflow.log_artifact")]
    assert [step for step, _ in images] == [2, 4]
    assert [file.name for file in files] == file_names(out / "samples")
    for (_, (image,)), file in zip(images, files, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(file)))
    assert [call[0] for call in calls[-2:]] == ["wandb.finish", "mlflow.end_run"]


def test_trackers_end_with_a_run_that_fails(
    make_config: MakeConfig, tmp_path: Path, calls: list[tuple[Any, ...]]
) -> None:
    with pytest.raises(RuntimeError, match="is not finite"):
        train(make_config(**RUN | {"optim": {"lr": 1e30, "warmup_steps": 0}}), tmp_path, "cpu")
    assert [call[0] for call in calls[-2:]] == ["wandb.finish", "mlflow.end_run"]


def test_missing_package_is_named_before_any_work(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddim.extras.find_spec", lambda name: None)
    out = tmp_path / "run"
    with pytest.raises(ImportError, match=r"^the tracker wandb requires wandb; install it with: pip install wandb$"):
        train(make_config(**RUN), out, "cpu")
    with pytest.raises(ImportError, match=r"install it with: pip install 'ddim\[train\]'$"):
        check_trackers(["tensorboard"])
    assert not out.exists()


def test_no_tracker(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(**RUN | {"trackers": []}), tmp_path, "cpu")
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert not (tmp_path / "tensorboard").exists()
