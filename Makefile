# Everything is installed into .venv, once, and again only after a change of what decides it.
#   make demo      install, and let the bundled model continue a prompt
#   make test      the quick checks          make test-all  the longer ones
#   make soak      the server's checks, over and over (MINUTES=10)
#   make bench     the engine's parts, timed and saved (ONLY=sampler: some of them)
#   make bench-compare   the medians of the last two runs, next to each other
#   make lint      style and types           make format    put the style right

export PYTHONSAFEPATH = 1
export HF_HUB_OFFLINE = 1
unexport TOKENIZERS_PARALLELISM

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INSTALL := $(PIP) --no-build-isolation --editable
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
CPP_FILES = $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc tests/native/*.cpp tests/native/*.h)

.PHONY: demo test test-all soak bench bench-compare lint format clean

# It writes nothing outside of this folder.
demo: export FASTGEN_CACHE = off
demo: .venv/demo.stamp
	$(BIN)/fastgen generate --seed 10 --temperature 0.7 --top-k 40 --max-new-tokens 60 \
		"In the beginning"

# As many processes as there are processors, 8 at most. Of the first run's files each is tested by one
# process; what the second run tests, in Triton's interpreter, needs no GPU.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8
BY_FILE = $(PYTEST) --dist loadfile --no-loadscope-reorder
INTERPRETED = TRITON_INTERPRET=1 $(PYTEST) --dist worksteal tests/kernels $(addprefix tests/decoders/test_, \
	cuda_decoder.py cuda_warmup.py interface.py run_ahead.py)

# ISA=avx2: the path of the C++ parts that is tested (portable, avx2, avx_vnni, avx512, avx512_vnni or
# avx512_bf16; on Arm portable, neon, neon_dotprod or neon_i8mm).
ifdef ISA
test test-all: export FASTGEN_ISA = $(ISA)
endif

test: .venv/test.stamp
	$(BY_FILE) -m "not slow"
	$(INTERPRETED) -m "not slow"

test-all: .venv/test.stamp
	$(BY_FILE) -m slow --durations 20
	$(INTERPRETED) -m slow --durations 20

MINUTES ?= 10
soak: .venv/test.stamp
	PYTHONPATH=tests/helpers $(BIN)/python tests/helpers/soak.py --minutes $(MINUTES)

ONLY ?=
RUNS := .benchmarks
bench: .venv/test.stamp
	$(BIN)/python -m pytest benchmarks/parts -o python_files='bench_*.py' \
		-o pythonpath='tests/helpers benchmarks' -rs -k '$(ONLY)' \
		-W default::pytest_benchmark.logger.PytestBenchmarkWarning \
		--benchmark-autosave --benchmark-storage=file://$(RUNS) --benchmark-disable-gc \
		--benchmark-group-by=group --benchmark-sort=min \
		--benchmark-columns=min,median,iqr,ops,rounds

bench-compare: .venv/test.stamp
	@test "$$(ls $(RUNS)/*/*.json 2>/dev/null | wc -l)" -ge 2 || { \
		echo "Fewer than two runs are saved; make bench saves one" >&2; exit 1; }
	$(BIN)/pytest-benchmark compare --between=median --sort=name $(if $(ONLY),-k '$(ONLY)') \
		$$(ls -tr $(RUNS)/*/*.json | tail -n 2)

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: .venv/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf .venv build dist *.egg-info fastgen/*.so .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fastgen needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making .venv"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual" \
		"environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

.venv/tools.stamp: .venv/made.stamp constraints.txt
	@echo "Installing the build tools into .venv"
	@$(PIP) setuptools wheel pybind11
	@touch $@

.venv/demo.stamp: .venv/tools.stamp $(BUILD_INPUTS)
	@echo "Installing fastgen into .venv; the first time this takes a minute"
	@$(INSTALL) .
	@$(BIN)/python -c 'import fastgen._native' 2>/dev/null || { \
		echo "Installing PyTorch, which takes the place of what no compiler was found for"; \
		$(INSTALL) '.[torch]'; }
	@touch $@

.venv/test.stamp: .venv/tools.stamp $(BUILD_INPUTS)
	@echo "Installing fastgen and its test tools into .venv; the first time this takes minutes"
	@$(INSTALL) '.[test]'
	@touch .venv/demo.stamp $@
