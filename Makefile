# Two commands on a fresh machine with python3 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BROWSER_READY := .venv/.browser-ready
IPYWIDGETS7 := .venv/ipywidgets7
PANEL_TESTS := tests/test_panels.py tests/test_explore.py tests/test_messages.py

# What is installed is compiled when it is first imported, and kept, also where the environment says otherwise: without
# that each of dozens of processes would compile PyTorch and fastai anew, twenty seconds each
export PYTHONDONTWRITEBYTECODE :=

# Three at a time: on two cores that took 1,237 s instead of 1,460, since many tests wait for other processes
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup

.PHONY: lint demo app test test-all notebooks pytest coverage browser test-browser test-ipywidgets7 site sync in-sync clean

demo: $(READY)    ## The whole method on drawn aircraft, offline: a table, pictures and demo/report.html
	$(BIN)/fgvc-demo --out demo

app: $(if $(RUN),,demo/report.html) $(BROWSER_READY)    ## The classifier that `make demo` has trained as a web page; RUN=FOLDER takes another run
	FGVC_FISHER_RUN=$(abspath $(RUN)) $(BIN)/voila nbs/app.ipynb

demo/report.html: $(READY)
	$(BIN)/fgvc-demo --out demo

test: notebooks pytest    ## Every notebook from top to bottom, then the tests that are neither slow nor need a browser: minutes

test-all:    ## Everything: the tests with the slow ones, which run every notebook in an empty folder, the documentation's links, the panels in a browser and with Colab's ipywidgets, and whether all is in sync
	$(MAKE) -j 2 lint browser $(IPYWIDGETS7)
	$(PYTEST) -m ''
	$(MAKE) -j 2 test-ipywidgets7 in-sync site

notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --timing

pytest: $(READY)
	$(PYTEST)

coverage: $(READY)    ## Which lines the tests that are not slow leave out; it makes them half as slow again
	$(PYTEST) --cov=fgvc_fisher --cov-report=term:skip-covered

browser: $(BROWSER_READY)    ## A headless Chromium, installed if there is none, or a sentence that says what to install
	$(BIN)/python tools/browser.py

test-browser: browser    ## The panels in a headless Chromium alone, under Voila and in JupyterLab
	$(BIN)/python -m pytest tests/browser -m browser

test-ipywidgets7: $(IPYWIDGETS7)    ## The panels' tests with the ipywidgets and the kernel that Colab has
	PYTHONPATH=$(CURDIR)/$(IPYWIDGETS7) $(BIN)/python -c "import ipykernel, ipywidgets; assert (ipywidgets.__version__, ipykernel.__version__)==('7.7.1', '6.17.1')"
	PYTHONPATH=$(CURDIR)/$(IPYWIDGETS7) $(PYTEST) -n 2 -m widgets $(PANEL_TESTS)

lint: $(READY)    ## Line length, names, bare excepts: modules, notebooks, tests, benchmarks
	$(BIN)/ruff check .

site: $(READY)    ## The pages of the documentation as far as Quarto is not needed, and all links that lead to them or to this repository
	OMP_NUM_THREADS=1 $(BIN)/python tools/links.py

sync: $(READY)    ## After a change of a notebook: export, clean, README.md, the sidebar and other pages made from notebooks
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean
	$(BIN)/python tools/outputs.py && $(BIN)/python tools/readme.py && $(BIN)/python tools/pages.py

in-sync: $(READY)    ## Fail if `make sync` has anything to do
	@state() { git status --porcelain; git diff; }; before="$$(state)"; $(MAKE) sync; \
	if [ "$$before" != "$$(state)" ]; then git status --short; git --no-pager diff --stat; \
		echo 'Notebooks, modules and README.md were not in sync: commit what `make sync` has changed.'; exit 1; fi

$(READY): settings.ini pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'    # compiled when it is imported: most of it never is
	touch $@

$(BROWSER_READY): $(READY)
	$(BIN)/pip list --format=freeze --exclude-editable > .venv/installed.txt
	$(BIN)/pip install --quiet --constraint .venv/installed.txt voila jupyterlab playwright
	touch $@

$(IPYWIDGETS7): $(READY)
	$(BIN)/pip install --quiet --upgrade --no-deps --target $@ ipywidgets==7.7.1 ipykernel==6.17.1 ipython-genutils==0.2.0

clean:
	rm -rf .venv demo screenshots build dist _proc _docs *.egg-info
