# Two commands on a fresh machine with python3 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BROWSER_READY := .venv/.browser-ready
IPYWIDGETS7 := .venv/ipywidgets7
PANEL_TESTS := tests/test_panels.py tests/test_explore.py

.PHONY: demo app test notebooks pytest test-browser test-ipywidgets7 sync clean

demo: $(READY)    ## The whole method on drawn aircraft, offline: a table, pictures and demo/report.html
	$(BIN)/fgvc-demo --out demo

app: $(if $(FGVC_FISHER_RUN),,demo/report.html) $(BROWSER_READY)    ## The classifier that `make demo` has trained as a web page; FGVC_FISHER_RUN=FOLDER takes another run
	$(BIN)/voila nbs/app.ipynb

demo/report.html: $(READY)
	$(BIN)/fgvc-demo --out demo

test: notebooks pytest    ## Every notebook top to bottom, then the test suite

notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --do-print

pytest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-browser: $(BROWSER_READY)    ## The panels in a headless Chromium, under Voila and in JupyterLab
	$(BIN)/python tools/browser.py
	$(BIN)/python -m pytest tests/browser -m browser

test-ipywidgets7: $(IPYWIDGETS7)    ## The panels' tests with the ipywidgets that Colab has
	PYTHONPATH=$(CURDIR)/$(IPYWIDGETS7) $(BIN)/python -c "import ipywidgets; assert ipywidgets.__version__=='7.7.1', ipywidgets"
	PYTHONPATH=$(CURDIR)/$(IPYWIDGETS7) $(BIN)/python -m pytest $(PANEL_TESTS)

sync: $(READY)    ## After a change of a notebook: export, clean, README.md
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python tools/readme.py

$(READY): settings.ini pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(BROWSER_READY): $(READY)
	$(BIN)/pip list --format=freeze --exclude-editable > .venv/installed.txt
	$(BIN)/pip install --quiet --constraint .venv/installed.txt voila jupyterlab playwright
	touch $@

$(IPYWIDGETS7): $(READY)
	$(BIN)/pip install --quiet --upgrade --no-deps --target $@ ipywidgets==7.7.1 ipython-genutils==0.2.0

clean:
	rm -rf .venv demo screenshots build dist *.egg-info
