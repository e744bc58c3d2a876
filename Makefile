# The two commands of the README, and what developers use besides.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: tiny test parity lint clean

tiny: $(READY)  ## set up, then train, export and sample a small model on real text: about 6 minutes on 2 cores
	$(VENV)/bin/python launchers/slurm.py --config configs/tiny.yaml --cluster local

test: $(READY)  ## set up, then run the tests: 15 to 35 minutes on 2 cores
	$(VENV)/bin/python -m pytest

parity: $(READY)  ## the long ones: every parallel layout with every model, every planned memory, every fault on a real Slurm
	$(VENV)/bin/python -m pytest tests/parallel tests/planning tests/launchers/test_slurm.py --parity

lint: $(READY)  ## ruff and mypy, as CI runs them
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
