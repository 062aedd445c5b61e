# make run    installs and runs the tour: a flagship claim of each paper, verified on real data
# make test   installs what the tests need and runs them all
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test lint docs bench browser scoreboard clean
.DELETE_ON_ERROR:

run: $(VENV)/.run
	$(BIN)/corollary tour

test: $(VENV)/.dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

# The daily page's million papers take a quarter of an hour and 6 GB of the temporary folder, which the next run finds again.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.web_scale

# The README's scoreboard, from the published results.
scoreboard: $(VENV)/.dev
	$(BIN)/python -m corollary.report.readme README.md

# torch comes first and alone, so that no other package chooses its build.
$(BIN)/torch.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.run: $(BIN)/torch.installed pyproject.toml
	$(PIP) --editable ".[hf,images,claims,web]"
	touch $@

$(VENV)/.dev: $(BIN)/torch.installed pyproject.toml
	$(PIP) --editable ".[hf,images,claims,web,postgres,bench,dask,docs,dev]"
	touch $@

# The report is tested in a real browser. Debian's is installed where that is possible; elsewhere any Chrome or Chromium on
# the PATH will do.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null \
	|| { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	     && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	|| echo "no Chromium found and none could be installed: the browser test will be skipped"

clean:
	rm -rf $(VENV) site report build dist
