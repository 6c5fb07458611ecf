# Two commands do everything: `make quickstart` and `make test`. Both set the machine up first, once.
# The first of these that kdjax runs on, or else python3, to be told why not.
FIT := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(FIT)' 2>/dev/null && break; p=python3; done; echo $$p)
endif
# cuda where an NVIDIA driver answers that CUDA 13 can use, else cpu; `make DEVICE=cpu` stays off a GPU.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1 | grep -x '[0-9]*')
LEAST_DRIVER := 580
ifndef DEVICE
DEVICE := $(shell test "$(or $(DRIVER),0)" -ge $(LEAST_DRIVER) && echo cuda || echo cpu)
endif
VENV := .venv
BIN := $(VENV)/bin
# Tensors in huge pages: a step on a CPU asks the kernel for most of its tensors anew, in pages of 4 KiB otherwise.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PIP := $(BIN)/pip --disable-pip-version-check install -q --no-warn-conflicts
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.ready-$(DEVICE)-$(shell cat pyproject.toml requirements/*.txt | cksum | cut -d' ' -f1)
# An environment that was made for the other kind of device is made anew.
OTHER := $(wildcard $(VENV)/.ready-$(if $(filter cuda,$(DEVICE)),cpu,cuda)-*)
# Without these instructions a CPU computes in bfloat16 many times slower than in float32, which `auto` is there.
CPUINFO ?= /proc/cpuinfo
BFLOAT16 = $(shell test $(DEVICE) = cuda || grep -qwE 'amx_bf16|avx512_bf16|bf16' $(CPUINFO) || echo teacher.dtype=auto)
# A run that is finished makes room for the next; one that was interrupted goes on.
AGAIN = overwrite=$(if $(wildcard runs/quickstart/result.json),true,false)

.PHONY: setup quickstart teacher test test-full bench bench-full gpu docs lint clean

quickstart: setup  ## on one device: its batch is a single row
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m kdjax.train --config configs/quickstart.yaml $(AGAIN) $(BFLOAT16)

teacher: setup  ## train the quickstart's teacher anew (an hour on two cores)
	$(BIN)/python -m kdjax.train --config configs/quickstart_teacher.yaml

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

test-full: setup
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest $(PARALLEL) -m "full or not full"

bench: setup  ## what a CPU can measure, alone on the machine: over an hour, 12 GB; then the README's table
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.transport_engine
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.trl_gkd
	$(BIN)/python -m benchmarks.fused_loss
	$(BIN)/python -m benchmarks.divergences
	$(BIN)/python -m benchmarks.table

bench-full: bench  ## and what distillation is worth, over several seeds: five hours more
	$(BIN)/python -m benchmarks.quickstart
	$(BIN)/python -m benchmarks.few_rows
	$(BIN)/python -m benchmarks.epochs
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
	@$(PYTHON) -c '$(FIT)' || { echo "kdjax needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version 2>&1); run make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip -a -z "$(OTHER)" || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo "no virtual environment could be made: install Python's venv (python3-venv on Debian and Ubuntu)"; exit 1; }
	@if test $(DEVICE) = cuda; then \
		echo "setting up $(VENV) for a GPU (several gigabytes)"; $(PIP) -c requirements/gpu-constraints.txt -e '.[gpu,test,docs,wandb]'; \
	else \
		test "$(or $(DRIVER),$(LEAST_DRIVER))" -ge $(LEAST_DRIVER) || echo "the NVIDIA driver, $(DRIVER), is older than CUDA 13 needs, $(LEAST_DRIVER): its GPU is left alone"; \
		echo "setting up $(VENV) for a CPU (two to five minutes)"; \
		$(PIP) --retries 1 --timeout 30 --no-deps -r requirements/cpu-torch.txt && \
		$(PIP) --no-deps -r requirements/cpu-sglang.txt && \
		$(PIP) -r requirements/cpu.txt && \
		$(PIP) --no-deps -e . && \
		$(BIN)/python -W ignore -m bridge.torchvision_hook ; \
	fi
	rm -f $(VENV)/.ready-*
	touch $@

clean:
	rm -rf $(VENV) .cache runs build site *.egg-info
