# `make demo` and `make test` need Python 3.11 and nothing else; both may be run as often as you like.

PYTHON ?= python3
BIN := .venv/bin
DEVELOPMENT := .venv/.installed-dev

.PHONY: demo test test-all check docs clean

demo: .venv/.installed
	$(BIN)/mmaccel demo

test: check
	$(BIN)/pytest -n 2 -m "not slow"

test-all: check
	$(BIN)/pytest -n 2

check: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and alone: its exact version, from pip's own sources, before anything else can ask for another build.
.venv/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmaccel needs Python 3.11 or newer; say make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(DEVELOPMENT): .venv/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch .venv/.installed $@

docs: $(DEVELOPMENT)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
