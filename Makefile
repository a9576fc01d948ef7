# make quickstart   train a small model on real text while its mixture moves
# make test         run the test suite; make test-slow: the tests that it leaves out, minutes each
# make claims       compare policies by experiment; PROFILE=smoke (default), cpu, confirm or gpu
# Each sets up all it needs, in .venv, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --durations=15
PIP := $(BIN)/python -m pip --disable-pip-version-check
CORPUS := runs/quickstart-data/corpus
MANIFEST := runs/quickstart-data/domains.yaml
RANKS ?= 2
PROFILE ?= smoke
JOBS ?= 2
# With several ranks on few cores, one thread each is fastest.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-slow claims check clean-quickstart

quickstart: $(MANIFEST)
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m megatron_tikmix examples/quickstart.yaml

$(MANIFEST): | $(VENV)/.installed
	$(BIN)/python tools/build_corpus.py --output $(CORPUS)
	$(BIN)/python tools/preprocess_data.py --input $(CORPUS) --output $(@D) \
	    --train_tokenizer --vocab_size 2048

clean-quickstart:
	rm -rf runs/quickstart runs/quickstart-data

# The unit tests by two processes, file by file; then jobs of several ranks, in a process of their own:
# what runs of one rank leave behind (threads of process groups, by the thousand) must not slow them.
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" --numprocesses 2 --dist loadfile tests/unit
	$(PYTEST) -m "not slow" tests/distributed tests/gpu

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow tests

claims: $(VENV)/.installed
	$(BIN)/python benchmarks/claims --profile $(PROFILE) --jobs $(JOBS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Set-up: nothing is fetched again, or at all, once these marks are newer than what they follow.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created setup.py constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
