# Two commands on a fresh machine with python3 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test notebooks pytest sync clean

demo: $(READY)    ## The whole method on drawn aircraft, offline: a table, pictures and demo/report.html
	$(BIN)/fgvc-demo --out demo

test: notebooks pytest    ## Every notebook top to bottom, then the test suite

notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --do-print

pytest: $(READY)
	$(BIN)/python -m pytest

sync: $(READY)    ## After a change of a notebook: export, clean, README.md
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python tools/readme.py

$(READY): settings.ini pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
