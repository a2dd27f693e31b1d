"""The scripts of `examples/`: each runs in a fresh process, and what it prints is what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from programs import run_python

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *arguments: str) -> str:
    """Return what an example prints."""
    done = run_python((EXAMPLES / f"{name}.py").read_text(), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(output: str) -> dict[str, list[float]]:
    """Return the rows of numbers in a printed table by their first column."""
    rows = [line.split() for line in output.splitlines()]
    return {row[0]: list(map(float, row[1:])) for row in rows if len(row) > 2 and re.fullmatch(r"[\d.e+-]+", row[1])}


def test_gaussian_matches_closed_form() -> None:
    rows = table(run_example("gaussian"))
    assert rows.keys() == {"10", "20", "50", "100"}
    errors = []
    for sampled, closed_form, order_2 in rows.values():
        assert sampled == closed_form
        assert abs(order_2 - 0.5) < abs(sampled - 0.5) / 10
        errors.append(abs(sampled - 0.5))
    assert errors == sorted(errors, reverse=True)


def test_train_minimal_learns_digits() -> None:
    output = run_example("train_minimal")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] / 2
    # The mean distance between training images and their nearest neighbors is 2.1; that from noise is 8.9.
    (distance,) = re.findall(r"nearest training image, mean of 8: ([\d.]+)", output)
    assert float(distance) < 4
    assert len(output.splitlines()[-1]) == 8 * 8 + 7 * 2


def test_invert_compares_exact_with_euler() -> None:
    rows = table(run_example("invert", "--steps", "5"))
    (euler, euler_nfe), (exact, exact_nfe) = rows["Euler"], rows["exact"]
    assert euler_nfe < 1.5 < exact_nfe
    assert exact < 1e-4 < euler


def test_invert_reads_images(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    assert table(run_example("invert", str(tmp_path / "black.png"), "--steps", "2")).keys() == {"Euler", "exact"}


def test_custom_solver_is_nearer_to_the_limit() -> None:
    rows = table(run_example("custom_solver"))
    assert rows.keys() == {"10", "20"}
    for ddim, adams_bashforth in rows.values():
        assert 0 < adams_bashforth < ddim


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_tested(path: Path) -> None:
    assert f'run_example("{path.stem}"' in Path(__file__).read_text()
