# make demo   set up, pack a model of about 250 MB, serve it, run real text through it
# make test   set up, lint, type-check, run every test
# make test-quick  the tests that start no other program, with fewer examples each, for between two changes
# make test-torch  the tests that need PyTorch, which is installed for them and which the others do without
# make test-ray  the tests that need Ray, likewise
# make test-engines  the tests on the own code of vLLM and SGLang, in an environment of its own; downloads about 800 MB
# make test-engines-gpu  those of them that need a GPU, where there is one; TORCH names a PyTorch for it
# make test-image  build the image with buildah, measure it, and ask a server in it; root, minutes. BASE names its base
# make tiny-lm  train a small Engram model, serve its tables, and compare every logit with tables in the process
# make bench  measure side by side with peers, about 13 minutes; see bench/RESULTS.md. JSON=FILE writes the records
# make bench-quick  the same in about 3 minutes, with fewer repeats
# make site   the pages of docs/ and their like as a site in site/, with search; a link that leads nowhere fails it
# make stubs  regenerate the protobuf code after a change of pool.proto
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
ENGINES ?= .venv-engines
ENGINE_WHEELS := vllm==0.33.0 sglang==0.5.23
# Four processes share the tests, for two cores, as many of them wait; what one has not begun another may take.
AT_ONCE ?= --numprocesses 4 --dist worksteal
# They start hundreds of processes, each of which would compile our modules again where bytecode must not be kept.
test test-quick test-torch test-ray test-engines test-engines-gpu test-image: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-quick test-torch test-ray test-engines test-engines-gpu test-image tiny-lm lint stubs site bench bench-quick clean

demo: $(VENV)/demo-installed
	$(BIN)/python examples/demo.py

# Kernels are compiled once, before several processes would each do so at one time.
KERNELS := from engrampool_proto.kernels import entries, hasher, histories, hot_rows, serve
# By a name, since `make -n` runs every line that names make itself.
LINT = $(MAKE) --no-print-directory lint

test: $(VENV)/dev-installed
	@# mypy has one core for itself alone, or beside the compiler and the tests.
	$(LINT) & lint=$$!; \
		$(BIN)/python -c "$(KERNELS)" && $(BIN)/python -m pytest $(AT_ONCE); tests=$$?; wait $$lint && exit $$tests

test-quick: $(VENV)/dev-installed
	$(BIN)/python -c "$(KERNELS)"
	$(BIN)/python -m pytest $(AT_ONCE) -m "not slow" --hypothesis-profile quick

test-torch: $(VENV)/torch-installed
	$(BIN)/python -m pytest tests/client/test_torch.py tests/client/test_torch_copies.py \
		tests/integration/test_tiny_engram_lm.py

test-ray: $(VENV)/dev-installed $(VENV)/ray-installed
	$(BIN)/python -m pytest tests/integration/test_ray.py

test-engines test-engines-gpu: export PYTHONPATH := $(CURDIR)/$(ENGINES)/wheels/unpacked

# The engines' kernels run in Triton's interpreter; without any GPU vLLM keeps Triton only if the variable is empty.
test-engines: export TRITON_INTERPRET := 1
test-engines: export CUDA_VISIBLE_DEVICES :=
test-engines: $(ENGINES)/installed
	$(ENGINES)/bin/python -c "$(KERNELS)"
	$(ENGINES)/bin/python -m pytest tests/engines

test-engines-gpu: $(ENGINES)/installed
	$(ENGINES)/bin/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('PyTorch finds no GPU here')"
	$(ENGINES)/bin/python -c "$(KERNELS)"
	$(ENGINES)/bin/python -m pytest tests/engines/test_gpu.py tests/engines/test_whole_model.py

# BASE: an image with Python 3.11, where there is a registry; else one is made of Debian's packages.
test-image: $(VENV)/dev-installed
	$(BIN)/python -m pytest tests/deploy/image.py

tiny-lm: $(VENV)/torch-installed
	$(BIN)/python examples/tiny_engram_lm.py

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/bench-peers-installed
	$(BIN)/python bench/run.py --out bench-data $(if $(JSON),--json $(JSON))
	$(BIN)/python bench/gather.py

bench-quick: $(VENV)/bench-peers-installed
	$(BIN)/python bench/run.py --quick --out bench-data $(if $(JSON),--json $(JSON))

site: $(VENV)/dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

stubs: $(VENV)/dev-installed
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
		engrampool_proto/v1/pool.proto

# One marker a set of extras: a changed pyproject.toml installs again.
$(VENV)/%-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

# On most machines this brings gigabytes of CUDA packages unless pip is told where PyTorch's CPU builds are, by
# PIP_EXTRA_INDEX_URL say, and TORCH names one.
$(VENV)/torch-installed: $(VENV)/dev-installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	touch $@

# The engines as their wheels have them, but for what is compiled, and not what they would install: most of it is CUDA.
$(ENGINES)/installed: pyproject.toml Makefile tests/engines/requirements.txt
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	PYTHONPATH= $(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[demo]' -r tests/engines/requirements.txt '$(TORCH)'
	rm -rf $(ENGINES)/wheels
	PYTHONPATH= $(ENGINES)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--only-binary :all: --dest $(ENGINES)/wheels $(ENGINE_WHEELS)
	for wheel in $(ENGINES)/wheels/*.whl; do $(ENGINES)/bin/python -c "import sys; from zipfile import ZipFile; \
		wheel = ZipFile(sys.argv[1]); wheel.extractall('$(ENGINES)/wheels/unpacked', \
		[name for name in wheel.namelist() if not name.endswith('.so')])" $$wheel && rm $$wheel || exit 1; done
	touch $@

# Peers without a wheel for every machine: one that is not here is listed with the reason.
$(VENV)/bench-peers-installed: $(VENV)/bench-installed
	for peer in pylibmc==1.6.3 mooncake-transfer-engine-non-cuda==0.3.13.post1; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: $$peer || true; done
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) demo-data bench-data site
