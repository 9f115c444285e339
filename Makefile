# make            this list
# `.ci/run` does the same as `make check` in a fresh environment, with every extra.

PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
.DEFAULT_GOAL := help
.PHONY: help check lint format types test wheel wheel-compiled clean-compiled docs site bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check: lint types test wheel  ## lint, types, tests and wheel in this environment

lint:  ## style, without changing files
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:  ## change files to the style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types:  ## mypy --strict
	$(PYTHON) -m mypy

test:  ## all tests that the installed extras allow
	$(PYTHON) -m pytest -q -n 2

wheel:  ## the wheel, into dist/
	$(PYTHON) -m build --wheel --outdir dist

wheel-compiled:  ## the same with the core compiled (needs a C compiler), into dist/
	SERVESIM_COMPILE=1 $(PYTHON) -m build --wheel --outdir dist

clean-compiled:  ## remove compiled modules from the checkout
	rm -f servesim/_compiled.json *__mypyc.*.so servesim/*/*.so

docs:  ## put real output into README.md and docs/*.md
	$(PYTHON) docs/refresh.py

site:  ## the docs as a site with search, into site/ (extra `docs`)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet

bench:  ## speed and memory of the simulator, into benchmarks/RESULTS.md
	$(PYTHON) benchmarks/speed.py
	$(PYTHON) benchmarks/search.py
