# make demo   set up, pack a model of about 250 MB, serve it, run real text through it
# make test   set up, lint, type-check, run every test
# make bench  measure lookups side by side with the raw-socket ceiling; see bench/RESULTS.md
# make stubs  regenerate the protobuf code after a change of pool.proto
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint stubs bench clean

demo: $(VENV)/demo-installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev-installed
	$(BIN)/python bench/lookup.py
	$(BIN)/python bench/transport.py

stubs: $(VENV)/dev-installed
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
		engrampool_proto/v1/pool.proto

# One marker a set of extras: a changed pyproject.toml installs again.
$(VENV)/%-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo-data
