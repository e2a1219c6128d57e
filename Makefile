# Needs Python 3.10 to 3.13, git and make. All the rest goes into .venv in this folder, which every target shares.
PYTHON ?= python3
BIN := .venv/bin
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"

# A .venv whose Python is gone, or that was made at another path, does not work: it is made again.
VENV_WORKS := $(shell $(BIN)/python -c '' 2>/dev/null && grep -qF '$(CURDIR)/.venv' $(BIN)/activate && echo yes)
INPUTS := setup.py settings.ini $(if $(VENV_WORKS),,new_venv)

.NOTPARALLEL:
.PHONY: help demo test docs bench notebooks sync clean new_venv

help:
	@echo "make demo       render toy cars, train, blend: runs/demo/report.html (10 minutes on two cores, offline)"
	@echo "make test       run every check: ruff, notebooks, pytest (12 minutes on two quiet cores)"
	@echo "make notebooks  run the notebooks and store their outputs (all, or NB=nbs/0_base/01_core.ipynb)"
	@echo "make sync       write what is generated from the notebooks: carproto/, README.md, the docs' sidebar"
	@echo "make docs       build the site in _docs/ (needs Quarto)"
	@echo "make bench      time training against torch-mimicry and the plain form (8 minutes on two cores): runs/bench/bench.json"
	@echo "make clean      remove .venv and caches; runs/ stays"
	@echo "PYTHON=python3.12 in front chooses the Python that .venv is made with"

demo: .venv/.runtime
	@$(IN_VENV) carproto demo $(ARGS)

# Notebooks and tests leave gigabytes of small runs in temporary folders.
test: .venv/.dev
	@export OMP_NUM_THREADS=1 $(IN_VENV) TMPDIR="$$(mktemp -d)"; trap 'rm -rf "$$TMPDIR"' EXIT; failed=; \
	echo "== ruff"; ruff check . || failed="$$failed ruff"; \
	echo "== notebooks"; nbdev_test --n_workers 2 --timing --do_print || failed="$$failed notebooks"; \
	echo "== pytest"; python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests || failed="$$failed pytest"; \
	[ -z "$$failed" ] || { echo "make test: failed in$$failed" >&2; exit 1; }

notebooks: .venv/.dev
	@export OMP_NUM_THREADS=1 $(IN_VENV); python tools/store_outputs.py $(NB) && python tools/sync.py

sync: .venv/.dev
	@$(IN_VENV) python tools/sync.py

# nbdev_docs would write README.md itself when it is older than its notebook.
docs: .venv/.dev
	@command -v quarto >/dev/null || { echo "The site needs Quarto: https://quarto.org/docs/get-started" >&2; exit 1; }
	@touch README.md
	@$(IN_VENV) nbdev_docs && echo "Open _docs/index.html"

# The peer lies beside .venv, not in it: only the process that times it sees it.
bench: .venv/.runtime
	@[ -d .bench/torch_mimicry ] || $(BIN)/python -m pip install --quiet --no-deps --target .bench torch-mimicry==0.1.16 \
		|| echo "torch-mimicry could not be installed (see above): the table goes without it" >&2
	@$(IN_VENV) python studies/bench.py $(ARGS)

clean:
	rm -rf .venv .bench _docs _proc build dist *.egg-info .pytest_cache .ruff_cache

.venv/.runtime: $(INPUTS)
	$(call install,.)
	@touch $@

.venv/.dev: $(INPUTS)
	$(call install,.[dev$(comma)scrape])
	@touch .venv/.runtime $@

comma := ,
define install
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
@echo "Installing into .venv (torch is large: some minutes the first time)"
@$(BIN)/python -m pip install -e '$(1)'
@$(BIN)/python -c 'import torchvision.ops' || { \
	echo "torch and torchvision in .venv do not fit each other; a lone wheel in a local pip folder does that." >&2; \
	echo "Install a pair that fits (https://github.com/pytorch/vision#installation), then run make again:" >&2; \
	echo "  $(BIN)/python -m pip install --force-reinstall torch==X torchvision==Y" >&2; exit 1; }
endef

new_venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "carproto needs Python 3.10 to 3.13; $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv || { echo "No venv here; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
