# make demo: train a GPT in front of your eyes; make test: all checks. Both set up .venv first.
# The README shows the plain commands behind them.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test notebooks clean

install: .venv/installed

# Some systems ship Python without ensurepip; pip from outside serves as well.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || $(PYTHON) -m venv --clear --without-pip .venv
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install -q pip
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

.venv/notebooks: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[notebooks]"
	touch $@

demo: .venv/installed
	$(BIN)/python data/pystdlib_char/prepare.py
	$(BIN)/python train.py config/demo.py
	$(BIN)/python sample.py --out_dir=out-demo --start="def " --num_samples=3 --max_new_tokens=600

test: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# What is left out of the files' metadata: times, and the version of Python.
notebooks: .venv/notebooks
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ClearMetadataPreprocessor.enabled=True \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask='{"kernelspec", ("language_info", "name")}' notebooks/*.ipynb

clean:
	rm -rf .venv out-demo *.egg-info
