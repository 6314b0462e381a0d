# What a person types. `make help` lists it.
PYTHON ?= python3
# Extra arguments for pip, such as an index with CPU builds of PyTorch: make demo PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
IMAGES := airflow trainer inference gateway monitoring mlflow
# Extra arguments for `docker build`, such as another base image: make images DOCKER_ARGS="--build-arg BASE=..."
DOCKER_ARGS ?=
# The index of PyTorch's build, for a CPU or one CUDA version; what extras of pyproject.toml images hold besides; their names' ends.
TORCH_INDEX ?=
EXTRAS ?=
REGISTRY ?=
NEWER ?= var/newer
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --dist loadfile
QUICK_TESTS := $(addprefix tests/test_,config.py imports.py metrics.py storage.py manifest.py dicom.py preprocessing.py models.py notify.py)
TAG ?= $(VERSION)
TERRAFORM := terraform/templates/project_cv_factory
ENV ?= dev
LOCK ?= true
CONFIG ?= configs/demo.yaml
HELM ?= helm
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
SOURCE ?= $(or $(shell git remote get-url origin 2>/dev/null | sed -E 's|//[^/@]*@|//|'),unknown)
REVISION = $(shell git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || echo unknown)

.DEFAULT_GOAL := help
.PHONY: help install demo up down test proofs test-kubernetes fuzz images sbom test-images env test-compose test-terraform test-chart $(IMAGES:%=image-%) push check-tag train deploy smoke notify plan apply licences try-newer lint format docs airflow-db clean

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

test: install  ## all tests but the proofs
	$(BIN)/python -m pytest -m "not proof" $(SIDE_BY_SIDE) $(ARGS)

proofs: install  ## the tests that take minutes: trainings, searches, rollouts and stages that are killed again and again
	$(BIN)/python -m pytest -m proof --ignore tests/kubernetes $(SIDE_BY_SIDE) $(ARGS)

test-kubernetes: install  ## the tests that need a cluster on this machine, found by KUBECONFIG (ARGS="-m proof": those that take minutes)
	$(BIN)/python -m pytest tests/kubernetes -rs -m "not proof" $(ARGS)

fuzz: install  ## five minutes of mutated DICOM files and configurations
	CVF_FUZZ_SECONDS=300 $(BIN)/python -m pytest tests/test_fuzz.py $(ARGS)

images: $(IMAGES:%=image-%)  ## build all images; `make image-gateway` builds one; REGISTRY=registry.example/ TAG=... name them

$(IMAGES:%=image-%): image-%:
	docker build $(DOCKER_ARGS) --file docker/Dockerfile --target $* --tag $(REGISTRY)cv-factory-$*:$(TAG) \
	  --build-arg PIP_ARGS="$(PIP_ARGS)" --build-arg TORCH_INDEX="$(TORCH_INDEX)" --build-arg EXTRAS="$(EXTRAS)" \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --build-arg SOURCE="$(SOURCE)" .

sbom:  ## copy the bills of materials of the images to var/sbom
	mkdir -p var/sbom
	for image in $(IMAGES:%=cv-factory-%); do docker run --rm --network none $(REGISTRY)$$image:$(TAG) \
	  cat /opt/venv/share/sbom/image.cdx.json > var/sbom/$$image.cdx.json || exit 1; done

# With KUBECONFIG and a command that copies an image to that cluster, also there: CVF_LOAD_IMAGE="kind load docker-image"
test-images: install  ## build and test the images with the local Docker engine
	CVF_IMAGES_TAG=$(TAG) $(BIN)/python -m pytest tests/test_images.py $(ARGS)

env:  ## write .env, the secrets of docker-compose.yaml
	@$(PYTHON) -m local.compose_env

test-compose: install images  ## start docker-compose.yaml, with stand-ins for public images, and go once round the loop
	CVF_COMPOSE=1 $(BIN)/python -m pytest tests/test_compose.py -rs $(ARGS)

# The command copies an image to the cluster of KUBECONFIG; the namespace is made for it and removed.
test-chart: image-gateway image-monitoring  ## install the chart with this checkout's images: CVF_LOAD_IMAGE="kind load docker-image"
	for image in gateway monitoring; do $(CVF_LOAD_IMAGE) $(REGISTRY)cv-factory-$$image:$(TAG) || exit 1; done
	trap 'kubectl delete namespace cvf-test-chart --wait=false' EXIT; \
	$(HELM) install demo helm/cv-factory --namespace cvf-test-chart --create-namespace --values helm/cv-factory/ci/kind-values.yaml \
	  --set image.registry="$(REGISTRY)" --set image.tag=$(TAG) --wait --timeout 5m && \
	$(HELM) test demo --namespace cvf-test-chart

test-terraform: install  ## format, validate and test terraform/, make it on moto's server, ask checkov where it is on the path
	CVF_TEST_TERRAFORM=1 $(BIN)/python -m pytest tests/test_terraform.py -rs $(ARGS)

check-tag:  ## whether REF, such as v1.2.3, is the version here: by it the chart and docker-compose.yaml ask for images
	@test "$(REF)" = "v$(VERSION)" || { echo "the tag is $(REF), pyproject.toml has version $(VERSION): the tag must be v$(VERSION)" >&2; exit 1; }

push:  ## push all images to REGISTRY, as `make images` has named them
	for image in $(IMAGES); do docker push $(REGISTRY)cv-factory-$$image:$(TAG) || exit 1; done

train: install  ## a training up to its registered version: CONFIG=configs/demo.yaml RUN=s3://bucket/project/runs/name
	for stage in ingest preprocess train evaluate gate register; do $(BIN)/cvf $$stage --config "$(CONFIG)" --run "$(RUN)" || exit; done

deploy: install  ## what `make train` has left to do: roll out, verify, promote
	$(BIN)/cvf run --config "$(CONFIG)" --run "$(RUN)"

smoke: install  ## ask a gateway one question: URL=http://127.0.0.1:8000, its key in CVF_GATEWAY_KEY or a token in CVF_GATEWAY_TOKEN
	$(BIN)/python -m local.smoke "$(URL)"

notify: export TEXT ?=
notify:  ## tell the team TEXT, by the webhook in SLACK_WEBHOOK
	@.ci/notify "$$TEXT"

plan:  ## what Terraform would change in ENV=dev, staging or prod; LOCK=false in a review, which holds no lock
	terraform -chdir=$(TERRAFORM) init -input=false -reconfigure -backend-config=envs/$(ENV).s3.tfbackend
	terraform -chdir=$(TERRAFORM) plan -input=false -lock=$(LOCK) -var-file=envs/$(ENV).tfvars

apply:  ## let Terraform change it
	terraform -chdir=$(TERRAFORM) init -input=false -reconfigure -backend-config=envs/$(ENV).s3.tfbackend
	terraform -chdir=$(TERRAFORM) apply -input=false -auto-approve -var-file=envs/$(ENV).tfvars

licences: install  ## write docs/licences.md anew
	$(BIN)/python docs/licences.py

# What pyproject.toml names goes to the newest that its ranges allow (torch is pinned there); the rest follows where it must. boto3 and
# pandas stay: others hold them, and pip would try versions of those others for hours, as it does without the lock as a start.
try-newer:  ## the newest versions that pyproject.toml allows, in a throw-away environment, with the quick tests
	rm -rf $(NEWER) && $(PYTHON) -m venv $(NEWER)
	$(NEWER)/bin/pip install -qq --disable-pip-version-check $(PIP_ARGS) --constraint requirements.lock --editable '.[dev]'
	$(NEWER)/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *sum(p["optional-dependencies"].values(), []), sep="\n")' | grep -vE '^(cv-factory|boto3|pandas)' > $(NEWER)/asked.txt
	$(NEWER)/bin/pip install -qq --disable-pip-version-check $(PIP_ARGS) --upgrade --requirement $(NEWER)/asked.txt
	$(NEWER)/bin/pip check
	$(NEWER)/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' | diff requirements.lock - | grep '^[<>] ' || true
	$(NEWER)/bin/python -m pytest $(QUICK_TESTS) $(ARGS)
	rm -rf $(NEWER)

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
