# make demo · make test · make test-slow · make lint · make docs
# Each target creates its virtual environment and installs what it needs.
# Another Python: make test PYTHON=python3.12 (it gets an environment of its own).

PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
# The tests compare exported checkpoints with PyTorch (CPU build) and annotate with models of timm, which needs
# the torchvision of this PyTorch. TORCH= leaves these tests out.
TORCH ?= $(shell $(PYTHON) -c 'import sys; print("torch==2.13.0 torchvision==0.28.0 timm" if sys.version_info[:2] == (3, 11) else "")')
WORKERS ?= 2
# The tested versions, for the Pythons that have such a file.
CONSTRAINTS := $(wildcard constraints/python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt)
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-slow lint docs clean

demo: $(VENV)/.demo
	$(VENV)/bin/python -m scripts.demo --out runs/demo

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check
	$(VENV)/bin/shellcheck scripts/*.sh .ci/run

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet
	@echo "built build/site/index.html"

clean:
	rm -rf .venv .venv-* build runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v < (3, 11) and sys.exit("tlvit needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 …" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml setup.py $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable ".[dev]" $(TORCH)
	@touch $@

$(VENV)/.docs: pyproject.toml setup.py $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable ".[docs]"
	@touch $@
