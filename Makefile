# Everything CI runs is a target here, so that it can be run alone.
PYTHON ?= python
JOBS ?= $(shell nproc)

.PHONY: help install lint format types stubs cpp asan tsan tidy fuzz test constraints clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: ## editable install with everything a developer needs
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'

lint: ## every pre-commit hook on every file
	pre-commit run --all-files --show-diff-on-failure

format: ## let ruff and clang-format rewrite the sources
	ruff check --fix .
	ruff format .
	git ls-files -z '*.cc' '*.h' | xargs -0 -r clang-format -i

types: ## mypy --strict on the installed package
	$(PYTHON) scripts/check_types.py

stubs: ## thor_fast/_core.pyi against the compiled module (needs a non-editable install)
	cd / && $(PYTHON) -m mypy.stubtest thor_fast._core --allowlist $(CURDIR)/scripts/stubtest_allowlist.txt

cpp: ## C++ core and its tests, optimised
	cmake --preset release && cmake --build --preset release -j $(JOBS) && ctest --preset release

asan: ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake --preset asan && cmake --build --preset asan -j $(JOBS) && ctest --preset asan

# ThreadSanitizer's shadow map does not fit every address-space layout: fix the layout.
tsan: ## C++ tests under ThreadSanitizer
	cmake --preset tsan && cmake --build --preset tsan -j $(JOBS)
	setarch $$(uname -m) -R ctest --preset tsan

tidy: ## clang-tidy, warnings are errors
	cmake --preset tidy && cmake --build --preset tidy -j $(JOBS)

# A fixed layout here too: clang before 18 has not room enough for every other.
FUZZ_SECONDS ?= 20
fuzz: ## each fuzz target for FUZZ_SECONDS (needs clang with libFuzzer)
	cmake --preset fuzz && cmake --build --preset fuzz -j $(JOBS)
	for source in tests/cpp/fuzz/*.cc; do \
	  target=$$(basename $$source .cc); echo "--- $$target"; \
	  mkdir -p build/fuzz/corpus/$$target build/fuzz/found; \
	  setarch $$(uname -m) -R ./build/fuzz/tests/cpp/fuzz/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -max_len=4096 \
	    -verbosity=0 -print_final_stats=1 -artifact_prefix=build/fuzz/found/$$target- \
	    build/fuzz/corpus/$$target tests/cpp/fuzz/corpus/$$target || exit 1; \
	done

test: ## the Python tests
	pytest

constraints: ## pin what this environment has installed
	grep '^#' constraints.txt > constraints.new
	$(PYTHON) -m pip freeze --exclude-editable --exclude thor_fast | sed 's/+cpu$$//' >> constraints.new
	mv constraints.new constraints.txt

clean: ## remove what was built
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
