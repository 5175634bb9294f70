# Everything runs in virtual environments made here from pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := jax==0.8.0 jaxlib==0.8.0 flax==0.12.0
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

.PHONY: demo quick test lint bench compiled programs notebooks docs browser test-lowest test-newest clean

demo: .venv/demo.done  ## train on handwritten digits, with and without batch normalization
	$(BIN)/python notebooks/train_digits.py

quick: lint  ## style, types, and one test of each kind, in a minute: before every commit
	$(PYTEST) @tests/quick.txt

test: .venv/dev.done  ## all tests, and the examples in docstrings, README and guide: before a change is sent
	$(PYTEST)
	find .jax_cache -type f -atime +7 -delete  # programs that no test has asked for in a week

lint: .venv/dev.done  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: .venv/notebooks.done  ## execute the notebooks, from clean kernels
	$(BIN)/python notebooks/run.py $(ARGS)

docs: .venv/docs.done  ## the site, in build/site; warnings are errors
	$(BIN)/sphinx-build -q --fail-on-warning --keep-going -d build/doctrees notebooks build/site

browser: docs .venv/browser.done  ## the site in a headless Chromium, which must be installed, with its driver
	$(BIN)/pytest tests/browser.py

bench: .venv/bench.done  ## time and memory, side by side with the other libraries
	$(BIN)/python tests/bench/run.py $(ARGS)

compiled: .venv/demo.done  ## what the compilers for a CPU, a TPU and an H100 make of it; no device is needed
	$(BIN)/python tests/bench/compiled.py $(ARGS)

programs: .venv/programs/programs$(if $(filter --all,$(ARGS)),-all).done  ## others' programs with our layers in place of theirs
	.venv/programs/bin/pytest -W default tests/real $(ARGS)
	.venv/programs/bin/pytest -k pytorch tests/test_ema.py tests/test_torch.py  # which need PyTorch

test-lowest:  ## the wheel, outside the checkout, on the oldest JAX and Flax: what depends on them
	.ci/test_wheel $(PYTHON) $(LOWEST)

test-newest:  ## the same on the newest that $(PYTHON) gets
	.ci/test_wheel $(PYTHON)

define install  # this extra, in this environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python -m pip install --quiet --editable ".[$*]"
	touch $@
endef

.venv/%.done: pyproject.toml
	$(call install,.venv)

.venv/programs/%.done: pyproject.toml
	$(call install,.venv/programs)

clean:
	rm -rf .venv .jax_cache build dist results
