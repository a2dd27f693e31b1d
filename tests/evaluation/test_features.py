"""Feature extractors, and the cache of features."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddim.evaluation import metrics
from ddim.evaluation.classifiers import DigitClassifier
from ddim.evaluation.features import Pixels, load_features
from ddim.evaluation.image_sets import ImageSet, sample_image_set
from ddim.evaluation.metrics import compute_features
from ddim.io.cache import Cache
from ddim.pipeline import DDIMPipeline


def test_features_are_cached(
    features_cache: Path, as_files: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8)
    first = compute_features(as_files(pixels), Pixels((1, 4, 4)))
    (cache_file,) = features_cache.iterdir()
    computed: list[int] = []

    class Recorder(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            computed.append(len(images))
            return super().forward(images)

    monkeypatch.setattr(metrics, "extractor_id", lambda extractor: cache_file.name.rsplit("-", 1)[0])
    again = compute_features(as_files(pixels), Recorder((1, 4, 4)))
    assert (computed, again.sha256) == ([], first.sha256)
    assert torch.equal(again.values, first.values)
    cache_file.write_bytes(b"\x93NUMPY damaged")
    assert torch.equal(compute_features(as_files(pixels), Recorder((1, 4, 4))).values, first.values)
    assert sum(computed) == 20
    # Of another shape, with the right checksum.
    stream = io.BytesIO()
    np.save(stream, np.zeros((19, 16), np.float32))
    assert Cache("features").write(cache_file.name, [stream.getvalue()])
    assert torch.equal(compute_features(as_files(pixels), Recorder((1, 4, 4))).values, first.values)
    assert sum(computed) == 40
    pixels[3, 0, 2, 2] += 1
    assert compute_features(as_files(pixels), Recorder((1, 4, 4))).sha256 != first.sha256
    assert sum(computed) == 60


def test_unwritable_cache_costs_only_time(
    as_files: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    pixels = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8)
    values = compute_features(as_files(pixels), Pixels((1, 4, 4))).values
    assert torch.equal(values, (pixels.flatten(1).double() / 255).float())
    assert len(caplog.messages) == 1


def test_large_images_are_averaged() -> None:
    """Otherwise the covariance of 256x256 images in color would take 309 GB."""
    pixels = torch.randint(256, (2, 3, 96, 64), dtype=torch.uint8)
    extractor = Pixels((3, 96, 64))
    expected = pixels.double().reshape(2, 3, 32, 3, 32, 2).mean((3, 5)) / 255
    assert extractor.num_features == 3 * 32 * 32
    torch.testing.assert_close(extractor(pixels), expected.flatten(1))


def test_classifier_recognizes_sampled_digits(pipe: DDIMPipeline) -> None:
    """The classifier is confident of samples of the built-in model, and finds all ten digits in them."""
    classifier: Any = load_features("mnist", (1, 28, 28))
    assert isinstance(classifier, DigitClassifier)
    samples = torch.cat(list(sample_image_set(pipe, 64, num_inference_steps=20).batches()))
    with torch.no_grad():
        probabilities = classifier.logits(classifier(samples)).softmax(1)
    assert float(probabilities.amax(1).mean()) > 0.9
    assert len(set(probabilities.argmax(1).tolist())) == 10


def test_torchscript_file(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(dim=(2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    features: Any = load_features(str(tmp_path / "mean.pt"), (3, 4, 4))
    assert features.num_features == 3
    assert torch.equal(features(torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)), torch.full((2, 3), 7.0))


def test_invalid_features_raise(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="features must be pixels, mnist, faces, inception or a TorchScript file, got 'resnet'"
    ):
        load_features("resnet", (3, 8, 8))
    with pytest.raises(ValueError, match="grayscale images of 28x28"):
        load_features("mnist", (3, 32, 32))
    (tmp_path / "x.pt").write_bytes(b"none")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_features(str(tmp_path / "x.pt"), (3, 8, 8))


def test_inception_requires_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"requires torch_fidelity; install it with: pip install 'ddim\[inception\]'"):
        load_features("inception", (3, 32, 32))


def test_unavailable_or_malicious_inception_weights_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Imported before its optional dependency is replaced, whose presence it examines.
    pytest.importorskip("torchmetrics.image.fid")
    url = "http://127.0.0.1:9/weights-6726825d.pth"
    library, network = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    network.URL_INCEPTION_V3 = url  # type: ignore[attr-defined]
    for module in (library, network):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="cannot be downloaded"):
        load_features("inception", (3, 32, 32))

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "trace",)

    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save({"fc.weight": Payload()}, tmp_path / "checkpoints" / Path(url).name)
    with pytest.raises(RuntimeError, match="are damaged"):
        load_features("inception", (3, 32, 32))
    assert not (tmp_path / "trace").exists()
