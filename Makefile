PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-engines fuzz stress mutate check dist clean

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

test: check
	$(BIN)/python -m pytest

# In processes of their own: each engine is told that it is on a gfx950 GPU.
test-engines: .engines/installed
	for engine in vllm sglang; do \
		.engines/venv/bin/python -m pytest -W ignore tests/engines/test_$${engine}*.py || exit 1; \
	done

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

# The engines' own Python, out of their wheels, without their dependencies, which are gigabytes for a GPU.
.engines/installed: requirements.txt requirements-engines.txt pyproject.toml
	test -x .engines/venv/bin/python || $(PYTHON) -m venv .engines/venv
	.engines/venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-engines.txt
	.engines/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	.engines/venv/bin/python tools/engines.py .engines
	touch $@

clean:
	rm -rf .venv .engines build dist *.egg-info
