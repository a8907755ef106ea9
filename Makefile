# make quickstart   trains a small detector, exact and compressed, and compares
# make test         runs the tests
# make lint         checks the style
# make clean        removes what was built or installed here
#
# Everything is installed in $(VENV); later runs reuse it.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONFIG := configs/actnn/retinanet_r18_digits.py
RUNS := work_dirs/quickstart

# Each stamp stands for one step of the set-up. Once torch is there, the package
# can be built while the rest is installed: make -j2.
TORCH := $(VENV)/.stamp-torch
ENVIRONMENT := $(VENV)/.stamp-environment
PACKAGE := $(VENV)/.stamp-package
TESTS := $(VENV)/.stamp-tests
LINT := $(VENV)/.stamp-lint

.PHONY: quickstart test lint clean
.DELETE_ON_ERROR:

quickstart: $(PACKAGE) $(ENVIRONMENT) data/digits
	@echo '--- exact (level L0) ---'
	$(BIN)/python tools/train.py $(CONFIG) --work-dir $(RUNS)/exact \
	    --cfg-options custom_hooks.0.level=L0
	@echo '--- 2-bit activations (level L3) ---'
	$(BIN)/python tools/train.py $(CONFIG) --work-dir $(RUNS)/compressed
	@$(BIN)/python tools/analysis_tools/compare_runs.py \
	    $(RUNS)/exact $(RUNS)/compressed

# A process a core, each of one thread; files stay whole, for what their tests
# share, and in the order of tests/conftest.py.
test: $(PACKAGE) $(ENVIRONMENT) $(TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile \
	    --no-loadscope-reorder

lint: $(LINT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	git ls-files 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.h' | \
	    xargs $(BIN)/clang-format --dry-run --Werror

# Made beside its place and then moved: a folder that is there is complete.
data/digits: | $(PACKAGE) $(ENVIRONMENT)
	rm -rf $@.part
	$(BIN)/python tools/dataset_converters/digits.py $@.part
	mv $@.part $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'mmactnn needs Python 3.10 or newer: make PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: mmcv, where it has to be built, is built against it.
$(TORCH): requirements/build.txt | $(BIN)/python
	$(PIP) install -r requirements/build.txt
	touch $@

$(ENVIRONMENT): requirements/openmmlab.txt requirements/runtime.txt $(TORCH)
	$(PIP) install --no-build-isolation -r requirements/build.txt \
	    -r requirements/openmmlab.txt -r requirements/runtime.txt
	touch $@

$(PACKAGE): setup.py pyproject.toml $(TORCH) \
    $(shell find csrc build_support -type f -not -name '*.pyc')
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

$(TESTS): requirements/tests.txt requirements/torchvision.txt $(ENVIRONMENT)
	$(PIP) install -r requirements/tests.txt
	$(PIP) install --no-deps --upgrade --target $(VENV)/torchvision \
	    -r requirements/torchvision.txt
	touch $@

$(LINT): requirements/lint.txt | $(BIN)/python
	$(PIP) install -r requirements/lint.txt
	touch $@

clean:
	rm -rf $(VENV) build dist mmactnn.egg-info mmactnn/.mim mmactnn/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
