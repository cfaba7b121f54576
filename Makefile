# `make demo` and `make test` each work as the first command on a fresh machine with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
# Ranks share the cores: one thread each. DeepSpeed would otherwise guess an accelerator and print a warning.
export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null && echo cuda || echo cpu)

.PHONY: env demo test lint types constraints clean

env: $(STAMP)

# Written last, so that an interrupted installation is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# DEMO_INPUT=FILE (.txt with blank lines between documents, or .jsonl with a "text" field) replaces the corpus.
demo: env
	$(VENV)/bin/megacore demo runs/demo $(if $(DEMO_INPUT),'--input=$(DEMO_INPUT)')

test: env
	$(VENV)/bin/pytest -q tests

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: env
	$(VENV)/bin/mypy

constraints: env
	(head -1 constraints.txt; $(VENV)/bin/pip freeze --exclude-editable | sed 's/+cpu//') > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) runs
