# make demo: set up and run the main job. make test: set up and pass the tests. make check: everything CI holds us to.
# make docs: build the documentation. make notebooks: render notebooks/ into docs/notebooks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test lint check docs notebooks format clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,check,torchao]"
	touch $@

demo: venv
	$(BIN)/mpq demo

# One process a core, one thread each: threads of several processes would wait for each other.
test: venv
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mpq solvers sensitivity hardware_models

check: lint test

docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python -m sphinx -q -W docs docs/_build/html
	@echo "open docs/_build/html/index.html"

notebooks: venv
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python docs/render_notebooks.py

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info
