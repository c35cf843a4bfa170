# demo, test: the two commands of the README. Everything lives in $(VENV), but for the model, in the
# user's cache folder.
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt
PYTEST = $(VENV)/bin/python -m pytest

.PHONY: demo test test-most test-fixed-time test-deep lint bench clean

demo: $(VENV)/.installed
	$(VENV)/bin/ucm demo $(ARGS)

# Two lanes at once: what lasts a fixed time on any machine gives way to the rest, and ends before
# it. With ARGS one run of pytest that takes them all.
test: $(VENV)/.installed-dev
ifdef ARGS
	$(PYTEST) -m "not slow" $(ARGS)
else
	@$(MAKE) --no-print-directory --jobs=2 test-fixed-time test-most
endif

test-most: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not fixed_time"

test-fixed-time: $(VENV)/.installed-dev
	nice $(PYTEST) -m "fixed_time and not slow" -o console_output_style=classic

# Hours: the deep figures of ucm/testing/lanes.py, and what is marked slow.
test-deep: $(VENV)/.installed-dev
	UCM_HYPOTHESIS_PROFILE=deep $(PYTEST) $(ARGS)

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
