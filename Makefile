PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz stress mutate check dist clean

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

test: check
	$(BIN)/python -m pytest

fuzz: .venv/installed
	FUZZ=$${FUZZ:-2000} $(BIN)/python -m pytest tests/test_state_machine.py

stress: .venv/installed
	STRESS_SECONDS=30 STRESS_INTERRUPTS=1000 $(BIN)/python -m pytest tests/test_threads.py

mutate: .venv/installed
	$(BIN)/python tools/mutate.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: .venv/installed
	rm -rf dist
	$(BIN)/python -m build

.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
