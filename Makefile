# Every target sets up what it needs; the first one takes a few minutes (environment, packages, the small model).
.PHONY: help setup web web-types screenshots up chat soak compose-test prove test test-full check format bench reference lock clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help:
	@echo "make up         serve the bundled model on this machine: page, WebSocket, REST and OpenAI API"
	@echo "make chat       talk with the bundled model in the terminal"
	@echo "make test       lint, types, contracts and every test (make test-full adds the long proofs)"
	@echo "make bench      plain against speculative decoding on this machine"
	@echo "make check      lint, types and import contracts only"
	@echo "make format     format the code"
	@echo "make web        build the page (make web-types: its types of the wire, out of the gateway's schema)"
	@echo "make compose-test  docker-compose.yml for real: builds, starts, uses and ends the stack (root, 15 GB)"
	@echo "make screenshots  the pictures in docs/images, out of real runs"
	@echo "make reference  write docs/reference and the dashboards out of the code"
	@echo "make lock       pin what is installed now (constraints.txt)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh $(VENV)
	@touch $@

web: $(READY)
	@scripts/web.sh $(VENV) build

web-types: $(READY)
	@scripts/web.sh $(VENV) types

screenshots: $(READY)
	scripts/test_packages.sh
	$(BIN)/gorgon models fetch smollm2
	scripts/web.sh $(VENV) screenshots

up: $(READY)
	@scripts/web.sh $(VENV) build || echo "up: the page could not be built (see above): serving without it" >&2
	@$(BIN)/gorgon up

chat: $(READY)
	@$(BIN)/gorgon models fetch smollm2 > /dev/null
	@$(BIN)/gorgon chat

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	scripts/web.sh $(VENV) check

# What `test` and `test-full` share: everything but pytest.
prove: check web
	scripts/test_packages.sh
	scripts/k8s_tools.sh
	$(BIN)/gorgon models fetch smollm2
	scripts/web.sh $(VENV) test
	scripts/web.sh $(VENV) e2e

# A file's tests stay together, in order, in one of two processes.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

test: prove
	$(PYTEST) -m "not full"

test-full: prove
	$(PYTEST)

soak: $(READY)
	PYTHONPATH=tests $(BIN)/python benchmarks/serving/soak.py --seconds 600

compose-test: $(READY)
	@scripts/compose_test.sh

bench: $(READY)
	$(BIN)/gorgon models fetch smollm2
	$(BIN)/gorgon bench engine --prompts benchmarks/data/mt_bench.jsonl --limit 20 --max-tokens 128

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	scripts/web.sh $(VENV) format

reference: $(READY)
	$(BIN)/python scripts/reference.py
	$(BIN)/python scripts/dashboards.py
	$(BIN)/python scripts/k8s_rules.py

lock: $(READY)
	scripts/lock.sh $(VENV)

clean:
	rm -rf $(VENV) web/node_modules web/dist services/gateway/gorgon_gateway/static build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
