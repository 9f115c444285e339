# make check      what CI runs, in this environment (`.ci/run` makes a fresh one)
# make docs       real output into README.md and docs/*.md
# make bench      speed and memory of the simulator into benchmarks/RESULTS.md

PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: check lint types test wheel docs bench

check: lint types test wheel

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -q -n 2

wheel:
	$(PYTHON) -m build --wheel --outdir dist

docs:
	$(PYTHON) docs/refresh.py

bench:
	$(PYTHON) benchmarks/speed.py
