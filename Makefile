# make serve   install into .venv and run `tandem up` (ARGS="--decode 2" adds flags)
# make test    install and run the tests
# make bench-split  split beside co-located on this machine
# make bench-cpu  Tandem beside its peers on this CPU
# make bench-speculation   tokens a second with speculation over without
# make bench-gpu   everything that is measured on a GPU, in one run of under 8 minutes
# make bench-gateway   the gateway under 2,048 streams, overload, slow and idle clients (ten minutes)
# make bench-policies   scheduling policies on recorded traces, simulated
# make kernels-aot   compile every Triton kernel, no GPU needed
# make chaos   real processes under random faults (ARGS="--seconds 300 --seed 7")
# make kill-score   8 clients, 100 requests each, one kill
# make seeded-bugs   bugs put in on purpose, and the tests that find them
# make bench-detection   how long until a dead or hung worker is known
# make model   the transfer protocol, checked by Spin
# make check   style, types, layers, sizes, wire format

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
ARGS ?=

# A thread for each of several test processes costs more than it gives on few cores.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0
SOURCES := protos gateway prefill_svc decode_svc worker engine kvtransfer kernels runtime tandem
ALL := $(SOURCES) compose tests tools $(wildcard benchmarks)

.PHONY: serve test test-optimized test-long chaos kill-score seeded-bugs model check protos dashboards kernels-aot bench bench-split bench-cpu bench-policies bench-speculation bench-tracing bench-gateway bench-detection bench-gpu clean

serve: $(VENV)/.installed
	@exec $(BIN)/tandem up $(ARGS)

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest $(ARGS)

# As under `python -O`: nothing may hang on an assert. pytest warns that asserts outside of tests are off.
test-optimized: $(VENV)/.installed-dev
	PYTHONOPTIMIZE=1 $(TEST_ENV) $(BIN)/python -m pytest -W ignore::pytest.PytestConfigWarning $(ARGS)

test-long: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m "long and not gpu" $(ARGS)

chaos: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m tests.faults.soak $(ARGS)

# Results go to benchmarks/results/kill_score.md.
kill-score: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m tests.faults.kill_score $(ARGS)

seeded-bugs: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m tests.faults.seeded_bugs $(ARGS)

# Installs nothing, and says so when spin is missing.
model:
	@python3 -m tests.model.check

check: $(VENV)/.installed-dev
	$(BIN)/ruff check $(ALL)
	$(BIN)/ruff format --check $(ALL)
	$(BIN)/mypy $(SOURCES) compose
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/python tools/sizes.py
	@if command -v npx >/dev/null 2>&1; then cd protos && npx --yes @bufbuild/buf lint; \
	else echo "SKIPPED: buf lint needs npx (sudo apt-get install npm)"; fi

protos: $(VENV)/.installed-dev
	$(BIN)/python tools/generate_stubs.py

dashboards: $(VENV)/.installed
	$(BIN)/python tools/dashboards.py

# Registers, stack and shared memory of each kernel go to benchmarks/results/kernels_aot.json.
kernels-aot: $(VENV)/.installed
	$(BIN)/python -m tools.compile_kernels $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/tandem bench $(ARGS)

# Tandem beside transformers and openvino-genai on this machine's CPU; installs the peers into .venv-peers.
bench-split: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m benchmarks.split $(ARGS)

bench-cpu: $(VENV)/.installed-dev
	@$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-speculation: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speculation $(ARGS)

bench-policies: $(VENV)/.installed
	$(BIN)/python -m benchmarks.policies $(ARGS)

# Results go to benchmarks/results/gateway.json and gateway.md.
bench-gateway: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m benchmarks.gateway $(ARGS)

# Results go to benchmarks/results/detection.json and detection.md.
bench-detection: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m benchmarks.detection $(ARGS)

# Installs nothing: it takes .venv's Python if there is one, else the python3 whose torch sees the GPU.
# Results go to benchmarks/results/gpu.json and gpu.md; without a GPU it says so and ends with code 2.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
bench-gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# CPU-seconds of all processes with every request traced, and without.
bench-tracing: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m benchmarks.tracing $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# A stamp is newer than what it was made from; an install that failed leaves none.
$(VENV)/.installed: pyproject.toml constraints.txt
	@tools/make_venv.sh $(VENV)
	@echo "installing into $(VENV)" >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	@tools/make_venv.sh $(VENV)
	@echo "installing into $(VENV), with what the tests need" >&2
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@
