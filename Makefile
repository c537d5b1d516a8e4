# `make resnet50` and `make test` are all a newcomer needs; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: help venv resnet50 zoo compare evidence calibrate cluster replicas search bench bench-jax test test-slow test-backends \
        test-matrix test-trackers fuzz host-tests docs dist venv-jax venv-torch venv-host venv-trackers lint format clean

help:
	@echo "make venv       set up .venv (the first step of every other target)"
	@echo "make resnet50   train ResNet-50 with clipping on the embedded MNIST images"
	@echo "make zoo        train every recipe on its embedded data and print one table"
	@echo "make compare    AlexNet with and without clipping, over learning rates and seeds"
	@echo "make evidence   which clipper at which learning rate: a table and a picture, ten minutes"
	@echo "make cluster    ResNet-50 as two workers on this machine"
	@echo "make search     search clipping thresholds on the embedded data"
	@echo "make calibrate  clipping thresholds from ResNet-50's own gradients"
	@echo "make replicas   what a threshold means on 1, 2 and 4 replicas, Keras beside us"
	@echo "make bench      what clipping costs, beside Keras, optax, PyTorch and a plain copy"
	@echo "make test       lint, type-check and test"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-backends  the core tests on TensorFlow, JAX and PyTorch"
	@echo "make test-matrix  the core tests on Keras 3.12 to nightly, TensorFlow 2.19 to 2.22"
	@echo "make test-trackers  figures as Weights & Biases, MLflow and trackio keep them, offline"
	@echo "make fuzz       FUZZ_EXAMPLES=10000 random configurations against NumPy, from FUZZ_SEED on"
	@echo "make host-tests  Keras's own tests with every optimizer wrapped, and keras-hub's backbones"
	@echo "make docs       build the site in build/docs, warnings are errors"
	@echo "make dist       build the wheel and the source distribution in dist/"
	@echo "make lint       ruff and mypy alone;  make format rewrites with ruff"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# The other backends live in environments of their own, without TensorFlow.
venv-jax: .venv-jax/.installed

venv-torch: .venv-torch/.installed

.venv-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt \
	  -e . $* $(REFERENCES_$*) hypothesis pytest pytest-timeout
	$(if $(ALONE_$*),.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints-$*.txt --no-deps $(ALONE_$*))
	@touch $@

# Keras's own tests import JAX and orbax; keras-hub brings its backbones.
venv-host: .venv-host/.installed

.venv-host/.installed: pyproject.toml constraints.txt constraints-host.txt
	$(PYTHON) -m venv .venv-host
	.venv-host/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -c constraints-host.txt -e '.[test]' jax keras-hub orbax-checkpoint
	@touch $@

# Theirs want an older protobuf than constraints.txt has.
venv-trackers: .venv-trackers/.installed

.venv-trackers/.installed: pyproject.toml constraints-trackers.txt
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints-trackers.txt -e '.[tensorflow]' mlflow-skinny trackio wandb pytest pytest-timeout
	@touch $@

# What the tests and the benchmark compare with. Of timm they need one file, and no torchvision.
REFERENCES_jax := optax
ALONE_torch := timm

resnet50: venv
	$(BIN)/python recipes/resnet50.py $(ARGS)

zoo: venv
	$(BIN)/python recipes/tools/zoo.py $(ARGS)

compare: venv
	$(BIN)/python recipes/tools/compare.py $(or $(RECIPE),alexnet) $(ARGS)

cluster: venv
	$(BIN)/python recipes/tools/cluster.py --workers $(or $(WORKERS),2) \
	  recipes/$(or $(RECIPE),resnet50).py $(ARGS)

search: venv
	$(BIN)/python tuning/search.py $(ARGS)

evidence: venv
	$(BIN)/python benchmarks/evidence.py $(ARGS)

bench: venv venv-jax venv-torch
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-jax: venv-jax
	.venv-jax/bin/python benchmarks/gpu.py --batch 8 --image 32 --steps 2 --rounds 2 \
	  --epochs 1 --examples 64 --rates 0.1 $(ARGS)

calibrate: venv
	$(BIN)/python recipes/tools/calibrate.py $(or $(RECIPE),resnet50) $(ARGS)

replicas: venv
	$(BIN)/python benchmarks/replicas.py $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Three processes for two cores: some tests wait for processes that they start.
test: lint
	$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

test-slow: venv
	$(BIN)/python -m pytest -m slow $(ARGS)

BACKEND_TESTS := tests/backends tests/clippers tests/fuzz tests/test_misuse.py

test-backends: venv venv-jax venv-torch
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest $(BACKEND_TESTS) $(ARGS)
	KERAS_BACKEND=jax .venv-jax/bin/python -m pytest $(BACKEND_TESTS) $(ARGS)
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest $(BACKEND_TESTS) $(ARGS)

# Builds and deletes one environment after the other; on old and new Python, if they are there.
test-matrix:
	$(PYTHON) benchmarks/version_matrix.py $(ARGS)

test-trackers: venv-trackers
	.venv-trackers/bin/python -c "import mlflow, trackio, wandb"  # or their tests would be skipped
	.venv-trackers/bin/python -m pytest tests/diagnostics/test_loggers.py $(ARGS)

# A new seed each time; it is printed, and gives the same configurations again.
FUZZ_EXAMPLES ?= 10000
FUZZ_SEED := $(or $(FUZZ_SEED),$(shell date +%s))

fuzz: venv
	@echo "FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_SEED=$(FUZZ_SEED)"
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -n 2 tests/fuzz $(ARGS)

host-tests: venv-host
	.venv-host/bin/python tests/host/run.py $(ARGS)
	.venv-host/bin/python -m pytest -m slow tests/host

docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going --fresh-env --quiet docs build/docs $(ARGS)

dist: venv
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .venv-jax .venv-torch .venv-host .venv-trackers build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
