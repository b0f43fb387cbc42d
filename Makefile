# Each target is enough on a machine that has Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test install clean

demo: $(INSTALLED)  ## pretrain, tune and sample the embedded digits; prints where the pictures lie
	$(VENV)/bin/fastcm train digits --out runs/digits

test: $(INSTALLED)  ## lint and all tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n auto --dist worksteal
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/interpreted -n auto --dist worksteal

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
