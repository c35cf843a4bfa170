# demo, test: the two commands of the README. Everything lives in $(VENV); nothing else is touched.
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-deep lint bench clean

demo: $(VENV)/.installed
	$(VENV)/bin/ucm demo $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m "not slow" $(ARGS)

test-deep: $(VENV)/.installed-dev
	UCM_HYPOTHESIS_PROFILE=deep $(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed-dev
	$(VENV)/bin/ucm bench engine $(ARGS)

# torch by its exact version and first: a range would let pip pick a build with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed constraints-gds.txt
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps -r constraints-gds.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
