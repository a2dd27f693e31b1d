# make demo      sample 16 faces and 16 digits with the built-in models
# make docs      build the documentation site into build/docs, and check its links
# make release   build the packages into dist, and try them in an empty environment
# make test      lint, formatting, spelling, types, the import contract and the whole test suite

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests benchmarks scripts examples

.PHONY: demo test docs release clean

demo: $(VENV)/core
	$(BIN)/ddim sample --model faces --count 16 --steps 20 --scale 2 --out demo.png
	$(BIN)/ddim sample --model mnist --count 16 --steps 50 --out demo-digits.png

test: $(VENV)/dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/codespell $(CODE) docs README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python scripts/check_website.py

release: $(VENV)/dev
	$(BIN)/python scripts/check_release.py

clean:
	rm -rf $(VENV) build/docs dist demo.png demo-digits.png

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "ddim needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@
