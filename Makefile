# make study   set-up and the laptop run (half an hour on two cores, offline)
# make smoke   set-up and the smoke run (minutes)
# make test    set-up and all tests, the chain at smoke size among them (a quarter of an hour)
# make quick   set-up and the tests that take a few minutes
# make lint    style of code and notebooks   make format mend the style
# make lab     set-up and JupyterLab         make doctor what this machine can run
# make setup-vllm   set-up and vllm: for the GPU, or for the CPU where there is none

PYTHON ?= python3
RUN := .venv/bin/python -m speed_utils

.PHONY: study smoke test quick lab lint format setup setup-vllm doctor

study: setup
	@$(RUN) run --profile laptop

smoke: setup
	@$(RUN) run --profile smoke

test: setup
	@.venv/bin/python -m pytest -m "not slow"

quick: setup
	@.venv/bin/python -m pytest -m "not slow and not chain"

lab: setup
	@.venv/bin/jupyter lab --notebook-dir=notebooks

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/nbstripout --verify --keep-id \
	  --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution" \
	  notebooks/*.ipynb

format: setup
	@.venv/bin/ruff check --fix-only .
	@.venv/bin/ruff format .
	@.venv/bin/nbstripout --keep-id \
	  --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution" \
	  notebooks/*.ipynb

setup:
	@$(PYTHON) speed_utils/setup_environment.py

setup-vllm: setup
	@$(PYTHON) speed_utils/setup_environment.py vllm

doctor: setup
	@$(RUN) doctor
