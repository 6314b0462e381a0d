# What a person types. `make help` lists it.
PYTHON ?= python3
# Extra arguments for pip, such as an index with CPU builds of PyTorch: make demo PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo up down test lint format docs airflow-db clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## create .venv with the tested lock

$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; give one with PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	@echo "installing the tested lock into .venv (a few minutes the first time)"
	$(BIN)/pip install -qq --disable-pip-version-check $(PIP_ARGS) --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: install  ## the closed loop on this machine; DATA=file.npz on real images, KEEP=1 leaves the services running
	$(BIN)/python -m local.demo $(if $(DATA),--data "$(DATA)") $(if $(KEEP),--keep)

up: install  ## Airflow, MLflow and the endpoint, to click through
	$(BIN)/python -m local.stack up

down: install  ## stop what `make up` or `make demo KEEP=1` left running
	$(BIN)/python -m local.stack down
	$(BIN)/python -m local.stack down --home var/demo
	$(BIN)/cvf endpoint --stop

test: install  ## all tests
	$(BIN)/python -m pytest $(ARGS)

lint: install  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## format the code
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

docs: install  ## write docs/configuration.md and docs/commands.md anew
	$(BIN)/python docs/generate.py

airflow-db: install  ## prepare the database of `airflow dags test` (see airflow.env)
	. ./airflow.env && $(BIN)/airflow db migrate

clean:  ## remove what runs have left in var/
	rm -rf var
