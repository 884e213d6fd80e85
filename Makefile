# make story   a minute-long video from examples/story.yaml, in out/
# make test    lint, type check and all tests
# make setup   only the environment, in .venv

PYTHON ?= python3
BIN := .venv/bin
# nproc tells no more than OMP_NUM_THREADS, which is of each process.
CORES := $(shell env -u OMP_NUM_THREADS nproc)
# No question about newer versions of pip, no build environment of its own: works without a network
# once everything is installed.
INSTALL := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := setup
.PHONY: setup story test lint browser

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# PyTorch first and by itself: its exact version takes the build that suits the machine.
	$(INSTALL) torch
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

story: setup
	$(BIN)/streamvid generate examples/story.yaml -o out/story.mp4 --contact-sheet

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Aside: beside a PyTorch for CPUs its operators do not load, and transformers would stumble over it.
.venv/torchvision: .venv/installed-dev
	$(INSTALL) --no-deps --upgrade --target $@ torchvision

test: lint browser .venv/torchvision
	$(BIN)/pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder --ignore tests/app
	$(BIN)/pytest tests/app -rR  # in real time: alone

# Pages are tested in a real browser: the distribution's, where there is none yet.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		(apt-get update && apt-get install -y --no-install-recommends chromium)

# The embedded model from nothing; every step goes on where it was stopped.
TRAIN := $(BIN)/streamvid train configs/train
.PHONY: diorama
diorama: .venv/installed-dev
	$(TRAIN)/diorama_text.yaml
	$(TRAIN)/diorama_vae.yaml --processes $(CORES)
	$(TRAIN)/diorama_decoder.yaml --processes $(CORES)
	$(TRAIN)/diorama_latents.yaml --processes $(CORES)
	$(TRAIN)/diorama_student.yaml --processes $(CORES)
	$(TRAIN)/diorama_assemble.yaml

# The published chain of stages from the shipped world, VAE and text encoder, and what each stage gains; also goes on where it
# was stopped. Hours per stage: docs/diorama.md.
.PHONY: chain
chain: .venv/installed-dev
	$(TRAIN)/diorama_chain_clips.yaml --processes $(CORES)
	$(TRAIN)/diorama_chain_teacher.yaml --processes $(CORES)
	$(TRAIN)/diorama_chain_causal.yaml --processes $(CORES)
	$(TRAIN)/diorama_chain_few_step.yaml --processes $(CORES)
	$(TRAIN)/diorama_chain_self_forcing.yaml --processes $(CORES)
	$(TRAIN)/diorama_chain_long.yaml --processes $(CORES)
	$(TRAIN)/diorama_chain_assemble.yaml
	$(BIN)/python -m streamvid.evaluation.stage_table configs/stages/diorama_chain.yaml --processes $(CORES)
