# Two commands do everything: `make quickstart` and `make test`. Both set the machine up first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tensors in huge pages: a step on a CPU asks the kernel for most of its tensors anew, in pages of 4 KiB otherwise.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PIP := $(BIN)/pip --disable-pip-version-check install -q --no-warn-conflicts
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml requirements/*.txt | cksum | cut -d' ' -f1)

.PHONY: setup quickstart teacher test test-full bench bench-full gpu docs lint clean

quickstart: setup  ## on one device: its batch is a single row
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m kdjax.train --config configs/quickstart.yaml overwrite=true

teacher: setup  ## train the quickstart's teacher anew (an hour on two cores)
	$(BIN)/python -m kdjax.train --config configs/quickstart_teacher.yaml

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

test-full: setup
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest $(PARALLEL) -m "full or not full"

bench: setup  ## what a CPU can measure, alone on the machine: over an hour, 12 GB; then the README's table
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.trl_gkd
	$(BIN)/python -m benchmarks.fused_loss
	$(BIN)/python -m benchmarks.divergences
	$(BIN)/python -m benchmarks.table

bench-full: bench  ## and what distillation is worth, over several seeds: three hours more
	$(BIN)/python -m benchmarks.quickstart
	$(BIN)/python -m benchmarks.few_rows
	$(BIN)/python -m benchmarks.on_policy
	$(BIN)/python -m benchmarks.table

gpu: setup  ## on a machine with a GPU: check and measure, ten minutes; Liger's loss too, where it can be installed
	-$(BIN)/python -c 'import liger_kernel' 2>/dev/null || $(PIP) --no-deps -c requirements/gpu-constraints.txt liger-kernel
	$(BIN)/python -m benchmarks.gpu

docs: setup  ## into site/; a link that leads nowhere in it is an error (the web's are not followed)
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict --quiet

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"kdjax needs Python 3.11 to 3.13, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		echo "setting up $(VENV) for a GPU (several gigabytes)"; $(PIP) -c requirements/gpu-constraints.txt -e '.[gpu,test,docs,wandb]'; \
	else \
		echo "setting up $(VENV) for a CPU (two to five minutes)"; \
		$(PIP) --retries 1 --timeout 30 --no-deps -r requirements/cpu-torch.txt && \
		$(PIP) --no-deps -r requirements/cpu-sglang.txt && \
		$(PIP) -r requirements/cpu.txt && \
		$(PIP) --no-deps -e . ; \
	fi
	rm -f $(VENV)/.ready-*
	touch $@

clean:
	rm -rf $(VENV) .cache runs build site *.egg-info
