PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick fuzz hostile conformance coverage mutants check format benchmark peers quality clean

demo: $(VENV)/.installed ## train a small CNN on digits, compile it for cpu and onnxruntime, print the table
	$(BIN)/python examples/digits.py

test: $(VENV)/.installed ## every test
	$(BIN)/python -m pytest -n auto --dist worksteal -q

quick: $(VENV)/.installed ## tests that take under ten seconds each
	$(BIN)/python -m pytest -n auto --dist worksteal -q -m "not slow"

fuzz: $(VENV)/.installed ## 10,000 graphs of the day through every oracle, under ten minutes on one core
	$(BIN)/python -m tests.fuzz --graphs 10000

hostile: $(VENV)/.installed ## hostile input, every item in a fresh process
	$(BIN)/python -m tests.hostile

conformance: $(VENV)/.installed ## the ONNX backend suite against every subject, with its scores
	$(BIN)/python -m tests.conformance

coverage: $(VENV)/.installed ## lines of optcompiler/ that the tests run; fails under 90%
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n auto --dist worksteal -q
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --skip-covered

mutants: $(VENV)/.installed ## small faults in planner, verifier and dependency graph; fails where tests notice under 80%
	$(BIN)/pip install -q -c constraints.txt -e '.[mutation]'
	$(BIN)/python -m tests.mutants

check: $(VENV)/.installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.installed ## the table of docs/benchmarks.md (needs the benchmark extra)
	$(BIN)/pip install -q -c constraints.txt -e '.[benchmark]'
	$(BIN)/python benchmarks/spine.py

peers: $(VENV)/.installed ## latency of cpu beside ONNX Runtime, OpenVINO and torch.compile: hours; see its options
	$(BIN)/pip install -q -c constraints.txt -e '.[benchmark,peers]'
	$(BIN)/python benchmarks/cpu.py

quality: $(VENV)/.installed ## what low precision loses, beside the peers; trains the models first: many hours
	$(BIN)/pip install -q -c constraints.txt -e '.[benchmark,peers]'
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.quality

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist mutants .coverage* .pytest_cache .ruff_cache
