# Two words for users: `make demo`, `make test`. Both build .venv first if it is not there.
PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A GPU machine: `make demo CONSTRAINTS=` takes the newest torch with CUDA instead of the pinned one.
CONSTRAINTS ?= -c constraints.txt
export HF_HUB_OFFLINE ?= 1
# Tests run in one process a core, at most four: their models are tiny, so threads would not help.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test quick lint format lab notebooks bench tiny-text tiny-vl clean

$(VENV)/.ok: pyproject.toml constraints.txt
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(CONSTRAINTS) -e ".[all]"
	touch $@

demo: $(VENV)/.ok
	$(BIN)/python -m ernie_lab demo

test: $(VENV)/.ok
	$(PYTEST)

quick: $(VENV)/.ok
	$(PYTEST) -x -m "not slow and not e2e"

lint: $(VENV)/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ok
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: $(VENV)/.ok
	HF_HUB_OFFLINE=0 $(BIN)/jupyter lab --notebook-dir notebooks

notebooks: $(VENV)/.ok
	$(BIN)/python notebooks/execute.py

# Ratios against transformers on this machine, into benchmarks/results/; it should do nothing else.
bench: $(VENV)/.ok
	for one in forward pictures attention loading importing placement ranks growth; do \
		$(BIN)/python -m benchmarks.$$one || exit 1; done

# Train the built-in model again, from the corpus to the card: about an hour on two cores.
tiny-text: $(VENV)/.ok
	$(BIN)/python -m ernie_lab.organisms.train out/tiny-text
	$(BIN)/python -m ernie_lab.organisms.export out/tiny-text
	$(BIN)/python -m ernie_lab.organisms.check out/tiny-text/model

# Train the glyph-board models again: three seeds and the idle twin, two at a time on two cores.
BOARDS := $(BIN)/python -m ernie_lab.organisms.boards
tiny-vl: $(VENV)/.ok
	$(BOARDS).eye out/tiny-vl/eye.pt
	$(BOARDS).train out/tiny-vl/seed0 --eye out/tiny-vl/eye.pt --seed 0 & \
	$(BOARDS).train out/tiny-vl/seed1 --eye out/tiny-vl/eye.pt --seed 1 & wait
	$(BOARDS).train out/tiny-vl/seed2 --eye out/tiny-vl/eye.pt --seed 2 & \
	$(BOARDS).train out/tiny-vl/idle --eye out/tiny-vl/eye.pt --seed 0 --dense-hidden 512 --last-stage too & wait
	for run in seed0 seed1 seed2 idle; do $(BOARDS).export out/tiny-vl/$$run || exit 1; done
	for run in seed0 seed1 seed2 idle; do $(BOARDS).check out/tiny-vl/$$run/model || failed=1; done; \
	test -z "$$failed"

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache
