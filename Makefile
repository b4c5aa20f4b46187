# The two commands are `make demo` and `make test`; everything else is for daily work.
.PHONY: setup demo test quick check servers frameworks one-framework up train clean
.DEFAULT_GOAL := help
# Every process of hundreds would compile whatever it imports.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make demo   set up, quantize, gate, serve, run the demo team; report in var/demo"
	@echo "make test   set up, lint, types, all tests (starts real engines)"
	@echo "make up     keep the stack running (Ctrl-C stops it)"
	@echo "make quick  the tests that need no engine"
	@echo "make check  lint and types"
	@echo "make frameworks  ten agent frameworks, each in an environment of its own, against the gateway"
	@echo "make setup  only the two environments"

setup:
	@deploy/setup.sh

demo: setup
	.venv/bin/tiercel demo

up: setup
	@.venv/bin/tiercel quantize
	.venv/bin/tiercel up

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

quick: setup
	.venv/bin/pytest -m "not engine and not network" -n 2 --dist loadfile

servers:
	@tests/servers.sh

# Environments of all frameworks, their scenarios, and the table in docs/frameworks.
frameworks: setup
	.venv/bin/python -m tests.frameworks.environments
	TIERCEL_FRAMEWORKS=all .venv/bin/pytest tests/frameworks tests/e2e/test_frameworks.py
	.venv/bin/python -m tests.frameworks.table

one-framework: setup
	@.venv/bin/python -m tests.frameworks.environments --if-possible openai-agents

test: servers one-framework check quick
	.venv/bin/pytest -m "engine or network"

# Trains the shipped demo model again: make train CLINC150=/path/to/clinc150.json
train: setup
	.venv/bin/python -m deploy.assistant.train --clinc150 $(CLINC150)

clean:
	rm -rf var .venv .venv-engine
