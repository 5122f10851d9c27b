# make book · make test · make notebooks · make clean.  Each installs into .venv what it needs, once.

PYTHON   ?= python3
CHAPTERS ?= $(wildcard book/*.ipynb)
VENV     := .venv
BIN      := $(VENV)/bin
READY    := $(VENV)/.installed

# The notebooks run in .venv's own kernel, whatever Jupyter, IPython or matplotlib its user has set up.
export JUPYTER_DATA_DIR   := $(CURDIR)/$(VENV)/share/jupyter
export JUPYTER_CONFIG_DIR := $(CURDIR)/$(VENV)/etc/jupyter
export IPYTHONDIR         := $(CURDIR)/$(VENV)/ipython
unexport JUPYTER_PATH JUPYTER_CONFIG_PATH MPLBACKEND MATPLOTLIBRC PYTHONPATH PYTHONHOME

.PHONY: help book test notebooks clean

help:
	@echo "make book       run every chapter and build the pages in _build/html"
	@echo "make test       run the tests, and every chapter against its stored outputs"
	@echo "make notebooks  run the chapters and store their outputs (some only: CHAPTERS=book/01_*.ipynb)"
	@echo "make clean      remove what was built; the environment .venv stays"
	@echo "PYTHON=python3.12 make …  makes .venv with another Python (3.11 or newer)"

# The versions of constraints.txt are those that the outputs were stored with.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# From nothing, every time: Sphinx runs only the chapters that it reads anew.
# -W -n: a warning, a failing cell or a dead reference is an error.
book: $(READY)
	rm -rf _build
	$(BIN)/jupyter-book build -W -n --keep-going .
	$(BIN)/python .ci/check_site.py _build/html
	@echo "Open $(CURDIR)/_build/html/index.html"

# A file to each core in turn, and one thread a process: two that share their cores would wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile \
	    --nbval --nbval-current-env --nbval-cell-timeout=600 \
	    --nbval-sanitize-with=tests/nbval_sanitize.cfg tests $(CHAPTERS)

# What differs between two runs on equal machines (times, the Python version) is not stored.
notebooks: $(READY)
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute --config=.ci/nbconvert_config.py $(CHAPTERS)
	$(BIN)/python .ci/landing_figure.py

clean:
	rm -rf _build build dist .pytest_cache
	find book src tests -name __pycache__ -prune -exec rm -rf {} +
	find book -name .ipynb_checkpoints -prune -exec rm -rf {} +
