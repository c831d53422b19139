# make demo · make test · make test-slow · make lint; each sets itself up (virtual environment, pip) where needed.
# Another Python: make test PYTHON=python3.12 (it gets an environment of its own).

PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
# The CPU build of PyTorch that the tests of exported checkpoints compare with; TORCH= does without these tests.
TORCH ?= $(shell $(PYTHON) -c 'import sys; print("torch==2.13.0" if sys.version_info[:2] == (3, 11) else "")')
WORKERS ?= 2
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.demo
	$(VENV)/bin/python -m scripts.demo --out runs/demo

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf .venv .venv-* runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v < (3, 11) and sys.exit("tlvit needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 …" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.py | $(VENV)/bin/python
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: setup.py | $(VENV)/bin/python
	$(PIP) --editable ".[dev]" $(TORCH)
	@touch $@
