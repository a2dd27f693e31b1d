"""Files beside the package: the same versions, requirements and commands as in `pyproject.toml` and the Makefile."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from ddim import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}
HOST = re.compile(r"https?://\S*(?:pypi|anaconda|pytorch\.org/whl|pythonhosted|npmjs)", re.IGNORECASE)


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, "MIT")
    assert citation["preferred-citation"]["identifiers"] == [{"type": "other", "value": "arXiv:2010.02502"}]


def test_conda_recipe_has_the_requirements_of_the_wheel() -> None:
    recipe = (ROOT / "packaging/conda/meta.yaml").read_text()
    listed = set(re.findall(r"^    - (.+)$", recipe[recipe.index("  run:") : recipe.index("test:")], re.MULTILINE))
    expected = {f"python {PROJECT['requires-python']}"}
    for requirement in PROJECT["dependencies"]:
        name, versions = re.match(r"([\w-]+)([^;]*)", requirement).groups()  # type: ignore[union-attr]
        expected.add(f"{CONDA_NAMES.get(name, name)} {versions.strip()}")
    assert listed == expected
    assert PROJECT["scripts"] == {"ddim": "ddim.cli:main"}
    assert "- ddim = ddim.cli:main" in recipe


def test_workflows_run_what_the_makefile_has() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        made = {command.split()[1] for command in commands if command.startswith("make ")}
        assert made, path
        assert made <= targets, path
    matrix = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: "
    assert [f"{prefix}{version}" for version in matrix["python"]] == [
        name for name in PROJECT["classifiers"] if name.startswith(prefix)
    ]


def test_container_installs_extras_that_exist() -> None:
    container = (ROOT / "packaging/Dockerfile").read_text()
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", container)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_licenses_of_the_weights_are_named() -> None:
    named = set(PROJECT["license"].split(" AND "))
    cards = [path.read_text() for path in sorted((ROOT / "src/ddim/models").glob("*/README.md"))]
    licenses = [re.search(r"^license: (.+)$", card, re.MULTILINE) for card in cards]
    assert named == {"MIT"} | {found[1].upper() for found in licenses if found}


def test_no_file_names_the_host_of_a_registry() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "packaging/Dockerfile", ".github/workflows"):
        path = ROOT / name
        for file in path.rglob("*") if path.is_dir() else [path]:
            assert not HOST.search(file.read_text()), file
