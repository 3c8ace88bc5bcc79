# Two commands do all the set-up by themselves: `make run` and `make test`.
#
#   PYTHON=python3.12   the interpreter that the virtual environment is made with (3.11 or newer)
#   PY=python3          use this interpreter as it is and make no environment (a machine whose Python has torch already)
#   JOBS=2              test processes

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
JOBS ?= 2

# With another PY there is nothing to install.
READY := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/installed)

# One thread per test process: the tensors are small, and the processes share the cores.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest
PLAIN = env -u TRITON_INTERPRET -u FLA_DISPATCH_USE $(PYTEST)

.PHONY: run test check test-unit test-interpreter test-compile-ahead test-gpu bench clean

run: $(READY)
	$(PY) -m fla_dispatch demo

# The interpreter is switched on for a whole process when triton is imported, and compile-ahead needs it off: own processes.
test: check
	$(MAKE) test-unit
	$(MAKE) test-interpreter
	$(MAKE) test-compile-ahead
	$(MAKE) test-gpu

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True))"

test-unit: $(READY)
	$(PLAIN) tests -n $(JOBS) --dist loadfile --timeout 180 \
		--ignore tests/interpreter --ignore tests/compile_ahead --ignore tests/gpu

test-interpreter: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -n $(JOBS) --timeout 300

test-compile-ahead: $(READY)
	$(PLAIN) tests/compile_ahead -n $(JOBS) --timeout 300

# Skips itself where there is no GPU; needs nothing but pytest beside torch, so that PY=python3 serves on a GPU machine.
test-gpu: $(READY)
	$(PLAIN) tests/gpu

# On a GPU: the tables of docs/measured.md, as JSON in results/.
bench: $(READY)
	$(PY) -m benchmarks.scalar_decay --out results
	$(PY) -m benchmarks.overhead --out results
	$(PY) -m benchmarks.records --out results

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
