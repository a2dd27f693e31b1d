"""Attributes: labels of data sets, frequencies and confidence by hand, the classifiers, reports and the command.

`faces.parquet` holds the first 20 test images of the drawn faces. Design: ToonHead by Johan Melin, CC BY 4.0.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli_batch import Commands
from ddim.evaluation.attributes import read_labels, summarize_attributes
from ddim.evaluation.classifiers import AttributeClassifier, DigitClassifier, load_classifier
from ddim.evaluation.features import load_features
from ddim.evaluation.image_sets import ImageSet, open_files
from ddim.evaluation.report import evaluate
from digits import write_digits

FACES = Path(__file__).with_name("faces.parquet")


class Logits:
    """Features that are logits: of a shape in columns 0 and 1, of a color in columns 2 to 4."""

    attributes = {"shape": ("round", "square"), "color": ("red", "green", "blue")}  # noqa: RUF012

    def attribute_logits(self, features: Tensor) -> dict[str, Tensor]:
        return {"shape": features[:, :2], "color": features[:, 2:]}


def log_odds(*probabilities: float) -> list[float]:
    return [math.log(probability) for probability in probabilities]


def test_frequencies_and_confidence_by_hand() -> None:
    samples = torch.tensor(
        [
            log_odds(0.95, 0.05, 0.92, 0.04, 0.04),
            log_odds(0.95, 0.05, 0.88, 0.06, 0.06),  # not sure of the color
            log_odds(0.3, 0.7, 0.02, 0.96, 0.02),  # not sure of the shape
            log_odds(0.05, 0.95, 0.02, 0.96, 0.02),
        ]
    )
    reference = torch.tensor([log_odds(0.95, 0.05, 0.02, 0.02, 0.96)] * 3 + [log_odds(0.95, 0.05, 0.5, 0.3, 0.2)])
    labels = {"color": torch.tensor([2, 2, 1, 0])}
    summary = summarize_attributes(Logits(), samples, reference, labels)
    assert summary.frequencies == {
        "shape": {"round": {"samples": 0.5, "reference": 1.0}, "square": {"samples": 0.5, "reference": 0.0}},
        "color": {
            "red": {"samples": 0.5, "reference": 0.25},
            "green": {"samples": 0.5, "reference": 0.0},
            "blue": {"samples": 0.0, "reference": 0.75},
        },
    }
    assert summary.metrics == pytest.approx(
        {
            "confident": 0.5,
            "confident_reference": 0.75,
            "confident_ratio": 2 / 3,
            "largest_difference": 75,
            "accuracy_color": 0.75,
        }
    )


def test_labels_are_columns_of_the_attributes_names() -> None:
    columns = {"color": ["blue", "mauve"], "label": ["round", "square"]}
    images = ImageSet("two", (1, 1, 1), 2, torch.zeros, True, columns.get)
    # `label` could be that of any attribute.
    assert {name: indices.tolist() for name, indices in read_labels(images, Logits()).items()} == {"color": [2, -1]}
    images = ImageSet("two", (1, 1, 1), 2, torch.zeros, True, {"label": ["3", "0.0"]}.get)
    assert read_labels(images, DigitClassifier())["digit"].tolist() == [3, 0]


def test_unknown_labels_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    features = torch.tensor([log_odds(0.5, 0.5, 0.02, 0.02, 0.96)] * 3)
    for column, accuracy in ((["blue", "-1", "red"], 0.5), (["mauve", "none", "none"], None)):
        images = ImageSet("three", (1, 1, 1), 3, torch.zeros, True, {"color": column}.get)
        summary = summarize_attributes(Logits(), features, features, read_labels(images, Logits()))
        assert summary.metrics.get("accuracy_color") == accuracy
    assert [record.getMessage() for record in caplog.records] == [
        "accuracy_color leaves out 1 of 3 images, whose labels are not among ['red', 'green', 'blue']: ['-1']",
        "accuracy_color leaves out 3 of 3 images, whose labels are not among ['red', 'green', 'blue']: "
        "['mauve', 'none']",
    ]


def test_faces_are_recognized() -> None:
    images = open_files(str(FACES))
    result = evaluate(images, images, "faces", [], attributes=True)
    attributes = load_classifier("faces", (3, 64, 64)).attributes
    metrics = result["metrics"]
    assert {f"accuracy_{name}": 1.0 for name in attributes}.items() <= metrics.items()
    assert metrics["confident"] >= 0.9
    assert (metrics["confident_ratio"], metrics["largest_difference"]) == (1, 0)
    column = images.read_column("rearHair")
    assert column is not None
    assert result["attributes"]["rearHair"]["none"]["reference"] == column.count("none") / 20


def test_invisible_noise_changes_no_attribute() -> None:
    """Colors are told apart by more than the last bits of drawn ones."""
    classifier = load_classifier("faces", (3, 64, 64))
    (pixels,) = open_files(str(FACES)).batches()
    noise = torch.randint(-4, 5, pixels.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pixels.int() + noise).clamp(0, 255).byte()
    with torch.no_grad():
        expected, actual = (classifier.attribute_logits(classifier(images)) for images in (pixels, noisy))
    for name, logits in expected.items():
        assert torch.equal(logits.argmax(1), actual[name].argmax(1)), name


def test_only_classifiers_recognize_attributes(as_files: Callable[..., ImageSet]) -> None:
    images = as_files(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert not isinstance(load_features("pixels", images.shape), AttributeClassifier)
    with pytest.raises(ValueError, match="features must be mnist or faces for attributes=True, got 'pixels'"):
        evaluate(images, images, "pixels", [], attributes=True)
    with pytest.raises(ValueError, match=r"expected shape \(3, 64, 64\), got \(3, 8, 8\)"):
        load_features("faces", images.shape)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("attributes")
    shutil.copy(FACES, folder)
    write_digits(folder / "small", 5)
    outputs = ["--out", "report.json", "--out", "report.csv", "--out", "report.md"]
    faces = ["evaluate", "faces.parquet", "-n", "10", "--reference", "faces.parquet", "--features", "faces"]
    table = {
        "report": [*faces, "--metrics", "precision", "--attributes", *outputs],
        "alone": ["evaluate", "small", "--metrics", "is", "--features", "mnist", "--attributes"],
        "pixels": ["evaluate", "small", "--reference", "small", "--attributes"],
    }
    with Commands(folder, table) as commands:
        yield commands


def test_command(commands: Commands) -> None:
    report: dict[str, Any] = json.loads(commands.output("report").read_text())
    frequencies = report["attributes"]["mouth"]["smile"]
    with commands.output("report").with_suffix(".csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["samples_mouth_smile"]) == frequencies["samples"]
    assert float(row["accuracy_mouth"]) == report["metrics"]["accuracy_mouth"]
    cells = ["mouth", "smile", *(f"{100 * frequencies[role]:.1f}%" for role in ("samples", "reference"))]
    assert any(line.split()[:4] == cells for line in commands["report"].stdout.splitlines())
    assert f"| {' | '.join(cells)} |" in commands.output("report").with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alone", "--reference must be given for --attributes, got None"),
        ("pixels", "--features must be mnist or faces for --attributes, got 'pixels'"),
    ],
)
def test_invalid_options_raise(commands: Commands, name: str, message: str) -> None:
    assert commands[name].code == 1
    assert message in commands[name].stderr
