# Every target works on a fresh machine that has git, make and python3: it makes .venv, installs what it needs there, and runs.
# A repeat finds the stamp files and starts at once.
#
#   make demo                            train on real digits, on faltung and on stock PyTorch
#   make test                            the test suite; PYTEST_ARGS="-k dispatch" narrows it
#   make upstream                        PyTorch's own convolution tests on faltung, fetched; UPSTREAM=FILE takes a copy of test_convolution.py
#   make bench                           the benchmark behind the README's table; BENCH_ARGS="resnet50 --batch 1" chooses another
#   make lint  make docs  make clean
#
# TORCH names the PyTorch to install, as pip reads it: make test TORCH="torch==2.13.0". It counts when .venv is made; `make clean` first
# to change it. A CPU-only build is much smaller: point pip at one with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
# Halves of the suite, so that most kernels are made and loaded by one process; who is done first takes over what is left.
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?= baselines

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Two test processes share the cores with OpenMP's threads, which would otherwise spin while they wait for each other.
test: export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test upstream bench report lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/faltung demo

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

upstream: $(VENV)/.test
	$(BIN)/python tests/upstream.py $(UPSTREAM)

bench: $(VENV)/.bench
	$(BIN)/faltung bench $(BENCH_ARGS) --csv benchmarks/results/cpu.csv
	$(BIN)/python -m faltung.bench.report $(wildcard benchmarks/results/cpu*.csv) --readme README.md --docs docs/benchmarks.md --plots docs/assets --layers avx512

report: $(VENV)/.bench
	$(BIN)/python -m faltung.bench.report $(wildcard benchmarks/results/cpu*.csv) --readme README.md --docs docs/benchmarks.md --plots docs/assets --layers avx512

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache

# torch first and by itself, so that the extras below never choose another one.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[$*]"
	@touch $@

# torchvision belongs to one release of torch, and may replace a CPU-only build by the one it was built with.
$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[bench]"
	@touch $@
