# Every target makes the environment it needs; python3 and make are all a fresh machine must have.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
RAY := .venv-ray

.PHONY: demo test test-ray lint unit format proto chaos fuzz soak clean \
	bench-exchange bench-kernels bench-wan bench-training bench-peers bench-growth \
	bench-convergence bench-durability bench-memory bench-stability bench-real bench-flood

demo: $(VENV)/.demo
	$(BIN)/paceline demo $(DEMO_FLAGS)

test: lint unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check

# Two at a time, by default: most tests wait for other processes.
PYTEST_PROCESSES ?= 2
unit: $(VENV)/.dev
	$(BIN)/pytest -n $(PYTEST_PROCESSES) --dist worksteal $(PYTEST_FLAGS)

# Runs on a local Ray cluster of several nodes, which are killed; Ray gets an environment of its own.
test-ray: $(RAY)/.ray
	$(RAY)/bin/pytest tests/integration/test_ray.py $(PYTEST_FLAGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev
	$(BIN)/python proto/generate.py

# Kills the server two hundred times while workers and links have troubles of their own; docs/reliability.md from it.
chaos: $(VENV)/.dev
	$(BIN)/python -m paceline_chaos --kills 200 --faults 500 --workers 12 \
		--output benchmarks/results/chaos.json --report docs/reliability.md $(CHAOS_FLAGS)

# A million inputs for everything that reads foreign bytes: no crash, no hang, no leak, no change of state.
fuzz: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m fuzz --output benchmarks/results/fuzz.json $(FUZZ_FLAGS)

bench-exchange: $(VENV)/.dev
	$(BIN)/python benchmarks/exchange.py

# The codecs and a fragment's arithmetic beside copies of as many bytes.
bench-kernels: $(VENV)/.dev
	$(BIN)/python benchmarks/kernels.py $(BENCH_FLAGS)

# Exchanges over emulated long links, beside raw TCP; needs root, /dev/net/tun and the ip command.
bench-wan: $(VENV)/.dev
	$(BIN)/python benchmarks/wan.py $(BENCH_FLAGS)

# Every method in every setting, in virtual time, and docs/results.md from it; what is kept is not played again.
bench-convergence: $(VENV)/.dev
	$(BIN)/python benchmarks/convergence.py $(BENCH_FLAGS)

# The papers' settings through real processes and sockets, beside the simulator.
bench-real: $(VENV)/.dev
	$(BIN)/python benchmarks/real.py $(BENCH_FLAGS)

# What durability costs, and how fast a killed server is back.
bench-durability: $(VENV)/.dev
	$(BIN)/python benchmarks/durability.py $(BENCH_FLAGS)

# A shard's memory with many slow workers, beside what it may take.
bench-memory: $(VENV)/.dev
	$(BIN)/python benchmarks/memory.py $(BENCH_FLAGS)

# Beside torchft, Flower, gloo and servers written by hand; the peers get an environment of their own.
bench-peers: $(VENV)/.dev $(PEERS)/.peers
	$(BIN)/python benchmarks/peers.py --venv $(PEERS) $(BENCH_FLAGS)

# What another worker notices of one identity that floods the server.
bench-flood: $(VENV)/.dev
	$(BIN)/python benchmarks/flood.py $(BENCH_FLAGS)

# What joining a run costs the training thread.
bench-training: $(VENV)/.dev
	$(BIN)/python benchmarks/training_thread.py $(BENCH_FLAGS)

# What grows with parameters, workers and fragments, and how fast.
bench-growth: $(VENV)/.dev
	$(BIN)/python benchmarks/growth.py $(BENCH_FLAGS)

# Thousands of rounds and hundreds of reconnects: does either side grow?
soak: $(VENV)/.dev
	$(BIN)/python benchmarks/soak.py $(BENCH_FLAGS)

bench-stability: $(VENV)/.dev
	$(BIN)/python benchmarks/stability.py $(BENCH_FLAGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RAY)/.ray: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet -c constraints.txt -e '.[dev,ray]'
	touch $@

$(PEERS)/.peers: benchmarks/peers.py $(VENV)/.dev
	$(BIN)/python benchmarks/peers.py --install --venv $(PEERS)
	touch $@

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
