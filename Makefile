# What a person types. `make help` lists it.
PYTHON ?= python3
# Extra arguments for pip, such as an index with CPU builds of PyTorch: make demo PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
# Extra arguments for `docker build`, such as another base image: make trainer-image DOCKER_ARGS="--build-arg BASE=..."
DOCKER_ARGS ?=
TRAINER_IMAGE ?= cv-factory-trainer:$(VERSION)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION = $(shell git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || echo unknown)

.DEFAULT_GOAL := help
.PHONY: help install demo up down test test-kubernetes fuzz trainer-image test-images lint format docs airflow-db clean

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

test-kubernetes: install  ## the tests that need a cluster on this machine, found by KUBECONFIG; elsewhere they skip
	$(BIN)/python -m pytest tests/kubernetes -rs $(ARGS)

fuzz: install  ## five minutes of mutated DICOM files and configurations
	CVF_FUZZ_SECONDS=300 $(BIN)/python -m pytest tests/test_fuzz.py $(ARGS)

trainer-image:  ## build the image that runs `cvf <stage>` in a pod
	docker build $(DOCKER_ARGS) --file docker/trainer.Dockerfile --tag $(TRAINER_IMAGE) --build-arg PIP_ARGS="$(PIP_ARGS)" \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) .

# With KUBECONFIG and a command that copies an image to that cluster, also there: CVF_LOAD_IMAGE="kind load docker-image"
test-images: install  ## build and test that image with the local Docker engine
	CVF_TRAINER_IMAGE=$(TRAINER_IMAGE) $(BIN)/python -m pytest tests/test_images.py $(ARGS)

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
