# make demo: train a GPT in front of your eyes; make test: all checks. Both set up .venv first, with the exact versions of
# requirements.lock. The README shows the plain commands behind them.

PYTHON ?= python3
DEVICE ?= cuda
VENV ?= .venv
BIN := $(VENV)/bin

# $(call install,ENVIRONMENT,locked or oldest,PACKAGES). -qq: pip shows errors alone, not what setuptools remarks.
install = $(1)/bin/python tests/pins.py $(2) > $(1)/pins.txt && \
    $(1)/bin/python -m pip install -qq -c $(1)/pins.txt --build-constraint $(1)/pins.txt $(3)

# $(call tests,ENVIRONMENT,MARKS,OPTIONS): on all cores, a thread a process; then, with all threads, those to be run alone.
parallel = -n auto --dist=worksteal
tests = $(1)/bin/python -m pytest $(parallel) -m "not alone$(2)"$(3) && \
    $(1)/bin/python -m pytest -m "alone$(2)"$(3) $$(grep -l "mark.alone" tests/test_*.py)

.PHONY: install demo test test-slow test-clients test-all test-latest test-oldest gpu lock notebooks clean

install: $(VENV)/installed

# Some systems ship Python without ensurepip; pip from outside serves as well.
%/made:
	test -x $*/bin/python || $(PYTHON) -m venv $* || $(PYTHON) -m venv --clear --without-pip $*
	$*/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $*/bin/python install -q pip
	$*/bin/python -m pip install -qq -c requirements.lock pip
	touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml requirements.lock
	$(call install,$(VENV),locked,-e .)
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(call install,$(VENV),locked,-e ".[test]")
	touch $@

$(VENV)/clients: $(VENV)/tested
	$(call install,$(VENV),locked,-e ".[clients]")
	touch $@

# Where there is no npm, its tests are skipped; where it can't install, they fail.
tests/npm/node_modules/made: tests/npm/package-lock.json
	! command -v npm >/dev/null || { cd tests/npm && npm ci --silent && touch node_modules/made; } || echo "npm ci has failed"

# llama.cpp is compiled: that takes a C++ compiler, and minutes.
$(VENV)/all: $(VENV)/clients
	$(call install,$(VENV),locked,llama-cpp-python)
	touch $@

$(VENV)/notebooks: $(VENV)/installed
	$(call install,$(VENV),locked,-e ".[notebooks]")
	touch $@

.venv-oldest/tested: extras := test,notebooks# a comma in a call's argument would end it
.venv-oldest/tested: .venv-oldest/made pyproject.toml
	$(call install,.venv-oldest,oldest,-e ".[$(extras)]")
	touch $@

demo: $(VENV)/installed
	$(BIN)/python data/pystdlib_char/prepare.py
	$(BIN)/python train.py config/demo.py
	$(BIN)/python sample.py --out_dir=out-demo --start="def " --num_samples=3 --max_new_tokens=600

test: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call tests,$(VENV), and not slow and not clients)

# What test leaves out: long runs, and more ways to divide the work among processes.
test-slow: $(VENV)/tested
	$(BIN)/python -m pytest $(parallel) -m slow

# And those that need other programs, which .ci/run installs on Debian: a browser, node, nginx.
test-clients: $(VENV)/clients tests/npm/node_modules/made
	$(BIN)/python -m pytest $(parallel) -m clients

# All of these and the tests that need llama.cpp; a test that is skipped for want of a package or of data fails.
test-all: $(VENV)/all tests/npm/node_modules/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call tests,$(VENV),, --complete)

# The two ends of what a user's own `pip install -e .` may find.
test-oldest: .venv-oldest/tested
	.venv-oldest/bin/python -m pip list
	$(call tests,.venv-oldest, and not clients)

test-latest: .venv-latest/made
	.venv-latest/bin/python -m pip install -qq --upgrade --upgrade-strategy=eager pip -e ".[test]"
	.venv-latest/bin/python -m pip list
	$(call tests,.venv-latest, and not clients)

# Takes the environment that is there, else PYTHON as it is: a machine with a GPU may have no network, and needs torch alone.
gpu:
	$(if $(wildcard $(VENV)/installed),$(BIN)/python,$(PYTHON)) tests/gpu.py --device=$(DEVICE)

# One lock for all systems and for each Python that pyproject.toml admits. torch's CUDA builds name what they need of CUDA
# themselves, each its own.
lock: .venv-lock/made
	.venv-lock/bin/python -m pip install -qq --upgrade uv
	.venv-lock/bin/uv pip compile -q --no-config --no-python-downloads --universal --python-version=3.10 --upgrade \
	    --all-extras --group=lock --no-header --no-annotate --output-file=.venv-lock/all.txt pyproject.toml
	echo "# Exact versions, for pip install -c; make lock renews them. No sums: torch's builds have one name and many sums." \
	    > requirements.lock
	grep -vE "^(cuda|nvidia|triton)" .venv-lock/all.txt >> requirements.lock

# What is left out of the files' metadata: times, and the version of Python.
notebooks: $(VENV)/notebooks
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ClearMetadataPreprocessor.enabled=True \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask='{"kernelspec", ("language_info", "name")}' notebooks/*.ipynb

clean:
	rm -rf .venv .venv-* out-demo out-gpu *.egg-info tests/npm/node_modules
