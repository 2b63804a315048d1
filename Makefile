# Two commands do everything on a fresh machine that has Python and make: `make demo` and `make test`.
#
#   PYTHON=python3.12 make test       another interpreter
#   TORCH_INDEX=URL make test         another index for torch alone, e.g. one with CPU builds
#   WORKERS=4 make test               as many processes, each with its share of the files of tests

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# an environment of its own: what makes the site is not beside the tests
SITE := .venv-site
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
BASE ?= HEAD
WORKERS ?= 2
# options of the zoo, e.g. ZOO="--minutes 60 --largest 200000000"
ZOO ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PIP_NO_INPUT = 1
# else each process compiles what it imports
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test same check lint types bench gpu fuzz oracles zoo corpus catalogue samples docs site wheel release clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "pip>=25.1"
	$(PIP) install --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --no-compile --constraint constraints.txt --editable . --group test
	$(BIN)/python -c "import h5py, hypothesis, jsonschema, onnxruntime, onnxscript, pytest, torch._dynamo, torch.onnx"  # compiles that alone
	$(BIN)/python -m compileall -q bntool  # pip compiles what it copies, not what is installed in place
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP) install --constraint constraints.txt --group dev
	touch $@

demo: $(VENV)/installed  ## run the whole story on sample_ckpts
	$(BIN)/python sample_ckpts/demo.py

test: $(VENV)/installed  ## run all tests
	@echo "all tests: about 7 minutes of one core, 4 on two that are free"
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

same: $(VENV)/installed  ## hold all that the commands do against another revision: make same BASE=main~1
	$(BIN)/python -m tests.behaviour $(BASE)

check: lint types test wheel  ## lint, types, tests, and the wheel in a clean environment

lint: $(VENV)/dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev  ## mypy, strict
	$(BIN)/mypy

bench: $(VENV)/installed  ## measure against peers in the same run; asserts nothing about time
	$(BIN)/python -m tests.benchmarks

gpu: $(VENV)/installed  ## measure on a GPU, in under five minutes
	$(BIN)/python -m tests.benchmarks on_device

oracles: $(VENV)/installed  ## re-derive the recorded answers of foreign frameworks
	$(BIN)/python -m tests.oracles

zoo: $(VENV)/installed  ## fold all of torchvision and timm, with scales of both signs and of one; goes on where it stopped
	mkdir -p .zoo
	$(BIN)/python -m tests.benchmarks.fold_zoo --negative 0.3 --results .zoo/mixed.jsonl $(ZOO)
	$(BIN)/python -m tests.benchmarks.fold_zoo --negative 0 --alone --results .zoo/positive.jsonl $(ZOO)
	$(BIN)/python -m tests.benchmarks.fold_zoo --families .zoo/mixed.jsonl .zoo/positive.jsonl --summary .zoo/families.json

corpus: $(VENV)/installed  ## make mistakes of training on five networks, and say which of them inspect names
	$(BIN)/python -m tests.corpus --record
	$(BIN)/python -m tests.documentation.corpus_table
	$(BIN)/python -m tests.documentation.threshold_table

catalogue: $(VENV)/installed  ## write the catalogue of architectures again; needs timm and torchvision there
	$(BIN)/python -m catalogue.build --keep .catalogue

fuzz: $(VENV)/installed  ## mutate files of all formats, 200,000 times
	$(BIN)/python -m tests.fuzz 200000

site: $(SITE)/installed  ## the documentation as a site, in build/site; its search needs a server: python -m http.server -d build/site
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

$(SITE)/installed: pyproject.toml constraints.txt
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip --disable-pip-version-check --quiet install "pip>=25.1"
	$(SITE)/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt --group site
	touch $@

wheel: $(VENV)/dev  ## build wheel and sdist, run the wheel in fresh environments, with and without dependencies
	$(BIN)/python -m tests.packaging

release: wheel  ## what a release would publish, in dist/, checked as the index would check it
	$(PIP) install --constraint constraints.txt --group release
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

samples: $(VENV)/installed  ## train the sample checkpoints again
	$(PIP) install --constraint constraints.txt --group samples
	$(BIN)/python sample_ckpts/make_samples.py

docs: $(VENV)/installed  ## write again what is made from the code: docs/cli.md, docs/python.md, parts of docs/schema, tables
	$(BIN)/python -m tests.documentation.cli_reference
	$(BIN)/python -m tests.documentation.folding_tables
	$(BIN)/python -m tests.documentation.format_tables
	$(BIN)/python -m tests.documentation.json_schemas
	$(BIN)/python -m tests.documentation.python_calls
	$(BIN)/python -m tests.documentation.safety_table

clean:  ## remove what was built
	rm -rf $(VENV) $(SITE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
