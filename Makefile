# `make demo` and `make test` set everything up from nothing; a second run re-installs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0

.PHONY: demo test lint clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --prefer-binary $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check --prefer-binary -e '.[executor,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/hrm validate --quick --out out

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist *.egg-info
