# Every target sets up what it needs; the first one takes a few minutes (environment, packages, the small model).
.PHONY: help setup up chat soak test test-full check format bench lock clean

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
	@echo "make lock       pin what is installed now (constraints.txt)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh $(VENV)
	@touch $@

up: $(READY)
	@$(BIN)/gorgon up

chat: $(READY)
	@$(BIN)/gorgon models fetch smollm2 > /dev/null
	@$(BIN)/gorgon chat

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	scripts/test_packages.sh
	$(BIN)/gorgon models fetch smollm2
	$(BIN)/pytest -m "not full"

test-full: check
	scripts/test_packages.sh
	$(BIN)/gorgon models fetch smollm2
	$(BIN)/pytest

soak: $(READY)
	PYTHONPATH=tests $(BIN)/python benchmarks/serving/soak.py --seconds 600

bench: $(READY)
	$(BIN)/gorgon models fetch smollm2
	$(BIN)/gorgon bench engine --prompts benchmarks/data/mt_bench.jsonl --limit 20 --max-tokens 128

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(READY)
	scripts/lock.sh $(VENV)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
