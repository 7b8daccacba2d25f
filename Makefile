# `make serve` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=

.PHONY: install serve dev test soak lint format types imports bench clean

serve: $(VENV)/.installed  ## serve the embedded default model (or MODEL=…) on 127.0.0.1:8000
	@$(BIN)/gpt2-server serve $(MODEL)

install: $(VENV)/.installed  ## what serving needs

$(VENV)/.installed: pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv --upgrade-deps $(VENV)
	@echo "Installing gpt2-server into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable .
	@touch $@

dev: $(VENV)/.dev  ## what tests and checks need too

$(VENV)/.dev: $(VENV)/.installed scripts/dev_requirements.py scripts/system_tools.sh
	@echo "Installing the development tools …"
	@$(BIN)/python scripts/dev_requirements.py | xargs -d '\n' $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
	@sh scripts/system_tools.sh
	@touch $@

test: dev  ## the tests, under ten minutes on two cores
	$(BIN)/python -m pytest

soak: dev  ## the slow tests: long state machines, fuzzing, soaks
	$(BIN)/python -m pytest -m slow

lint: dev  ## style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

bench: dev  ## our server, and any PEERS="--peer NAME=URL", under the same load; PROFILE=1 says where the time goes
	$(BIN)/python -m benchmarks.serving $(if $(MODEL),--model $(MODEL)) $(if $(PROFILE),--profile) $(PEERS)
