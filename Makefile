# `make test`  sets up one environment per supported transformers version and runs the tests in each.
# `make demo`  sets up one environment and shows the model at work.
# `make bench` measures this project beside its peers, each in an environment of its own.
# The tests' tensors are small: one thread each is fastest, and sparing on a busy machine.
# Environments stand under .venv/ and are used again while the requirements stay the same.

PYTHON ?= python3
TORCH := 2.13.0
VERSIONS := 4.57.1 4.57.6 5.23.0
NEWEST := $(lastword $(VERSIONS))
TRITON := 3.7.1

.PHONY: test demo bench clean

# All versions at once; each prints when it is done. What does not hang on the version (the benchmarks, which run in the newest environment
# alone, kernels, grammars, what killed processes leave behind) is tested beside them, once.
test: $(VERSIONS:%=.venv/%/complete)
	@{ printf '%s:not once\n' $(VERSIONS); echo '$(NEWEST):once'; } | xargs -P 4 -I JOB sh -c '\
	    job="JOB"; version=$${job%%:*}; which=$${job#*:}; log=".venv/$$version/$$which.log"; \
	    PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 .venv/$$version/bin/python -m pytest -q -m "$$which" > "$$log" 2>&1; status=$$?; \
	    echo "== transformers $$version, $$which"; cat "$$log"; exit $$status'

demo: .venv/$(NEWEST)/complete
	.venv/$(NEWEST)/bin/kimi-k26 demo

# llama.cpp is built from source for this processor, which takes minutes; an environment of its own keeps it out of the tests.
bench: .venv/$(NEWEST)/complete .venv/llama.cpp/complete
	.venv/$(NEWEST)/bin/python benchmarks/text.py --profile --json benchmarks/text.json --plot benchmarks/text.png
	.venv/$(NEWEST)/bin/python benchmarks/compiled.py --json benchmarks/compiled.json
	.venv/$(NEWEST)/bin/python benchmarks/vision.py --profile --json benchmarks/vision.json --plot benchmarks/vision.png
	.venv/$(NEWEST)/bin/python benchmarks/media.py --json benchmarks/media.json --plot benchmarks/media.png
	.venv/$(NEWEST)/bin/python benchmarks/tokenizer.py --json benchmarks/tokenizer.json
	.venv/$(NEWEST)/bin/python benchmarks/startup.py --json benchmarks/startup.json
	.venv/$(NEWEST)/bin/python benchmarks/serving.py --json benchmarks/serving.json

clean:
	rm -rf .venv benchmarks/work build dist *.egg-info demo-output .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned, so that nothing after it brings another build. Files are compiled when first imported.
# triton, which PyTorch for CPUs does without, stands beside the packages: PyTorch loads it wherever it finds it, 70 MiB in
# every process. Only the tests of the GPU's kernels look there, for its interpreter.
.venv/%/complete: tests/requirements.txt pyproject.toml setup.py Makefile
	rm -rf .venv/$*
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python -m pip install -q --no-compile torch==$(TORCH)
	.venv/$*/bin/python -m pip install -q --no-compile torch==$(TORCH) transformers==$* -r tests/requirements.txt
	.venv/$*/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	.venv/$*/bin/python -m pip check
	[ `uname` != Linux ] || .venv/$*/bin/python -m pip install -q --no-compile --no-deps --target .venv/$*/triton triton==$(TRITON)
	touch $@

.venv/llama.cpp/complete: benchmarks/requirements.txt
	rm -rf .venv/llama.cpp
	$(PYTHON) -m venv .venv/llama.cpp
	.venv/llama.cpp/bin/python -m pip install -q --no-binary llama-cpp-python -r benchmarks/requirements.txt
	touch $@
