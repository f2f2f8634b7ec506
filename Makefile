# The two commands are `make demo` and `make test`; README.md says what they do and take. Each script sets up what is missing.
# PYTHON chooses the interpreter of .venv (3.11, 3.12 or 3.13).

.PHONY: help setup build kernels demo test sanitize supply-chain test-gpu bench-gpu soak fuzz wheel docs lint format clean

help:
	@echo 'make setup   .venv with vLLM and the plugin, libkakeya, a small model'
	@echo 'make demo    a real model through KAKEYA: text, capacity and quality (writes demo.json)'
	@echo 'make test    every test'
	@echo 'make sanitize      the tests under Miri, sanitizers and valgrind, as far as they are installed'
	@echo 'make supply-chain  licences, sources and known vulnerabilities of what the code depends on'
	@echo 'make build   libkakeya only'
	@echo 'make kernels   the CUDA kernels, for the next build (needs no GPU; set-up does it where there is one)'
	@echo 'make wheel   dist/release: the manylinux wheel with all kernels and the sdist, tested (half an hour, once, for the kernels)'
	@echo 'make docs    target/book: the pages of docs/ as a site (mdBook, compiled once where it is missing)'
	@echo 'make test-gpu  kernels and engines on a GPU; make bench-gpu measures them'
	@echo 'make soak    real vLLM under random load, on the CPU or the GPU (MINUTES=10 SEED= MODEL=)'
	@echo 'make fuzz    every fuzz target for SECONDS=15 (or TARGETS="page abi"); needs a nightly compiler and cargo-fuzz'
	@echo 'make lint    formatters and linters only; make format mends what they can'
	@echo 'make clean   remove what the above made, except downloads and .venv'

setup:
	@scripts/setup.sh

build:
	@bash -c 'source scripts/common.sh && cargo build --release --locked -p kakeya-ffi'

kernels:
	@scripts/kernels.sh

wheel:
	@scripts/wheel.sh

docs:
	@scripts/docs.sh

demo: setup
	@scripts/demo.sh

test: setup
	@scripts/test.sh

sanitize: setup
	@scripts/sanitize.sh

supply-chain: setup
	@scripts/supply_chain.sh

test-gpu: setup
	@scripts/test_gpu.sh

bench-gpu: setup
	@scripts/bench_gpu.sh

soak: setup
	@bash -c 'source scripts/common.sh && cd "$$ROOT" && "$$PY" scripts/soak.py --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(if $(MODEL),--model $(MODEL))'

fuzz:
	@scripts/fuzz.sh $(or $(SECONDS),15) $(TARGETS)

lint: setup
	@scripts/test.sh lint

format: setup
	@scripts/format.sh

clean:
	cargo clean
	rm -rf dist demo.json .cache/stamps .cache/capi* .cache/emulated .cache/models .cache/kakeya
