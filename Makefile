# Everything here works on a fresh Debian 12 or 13 machine, as root or with sudo; the first run installs what it needs.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python

help: ## this list
	@awk -F ':.*## ' '/^[a-z][a-zA-Z%-]*:.*## / { sub("%", "NAME"); printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: bootstrap ## build a server, deploy the example application to it, print its URL
	@$(PYTHON) tools/demo.py

test: bootstrap ## lint, unit and every scenario; closes with one line that counts them all
	@$(PYTHON) tools/testrun.py all

lint: bootstrap ## ansible-lint, yamllint, ruff, mypy, and no trace of this machine
	@$(PYTHON) tools/testrun.py lint

unit: bootstrap ## fast tests without hosts
	@$(PYTHON) tools/testrun.py unit

scenario-%: bootstrap ## one Molecule scenario whole: make scenario-default
	@$(PYTHON) tools/testrun.py scenario $*

bench: bench-releases bench-lockup ## every benchmark

bench-%: bootstrap ## measure on the hosts of a scenario, record it in benchmarks/: make bench-releases
	@MOLECULE_TESTS=../../benchmarks/$* tools/molecule test --scenario-name $* --no-command-borders

docs: bootstrap ## write the variables into the role's defaults and README
	@$(PYTHON) tools/docs.py

releases-report: bootstrap ## write docs/releases.md from the last run of the scenario releases
	@$(PYTHON) tools/releases_report.py

lockup-report: bootstrap ## write the tables and figures of docs/lockup.md from the last runs of its scenario and benchmark
	@UV_CONFIG_FILE=.venv/uv.toml .venv/bin/uv run --quiet --no-project --python $(PYTHON) --with-requirements requirements/report.txt \
		python tools/lockup_report.py

lock: bootstrap ## lock the newest versions that requirements/tools.in allows
	@UV_CONFIG_FILE=.venv/uv.toml .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header requirements/tools.in --output-file requirements/tools.txt
	@UV_CONFIG_FILE=.venv/uv.toml .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header requirements/report.in --output-file requirements/report.txt

clean: ## remove the demo and every other test host
	@[ ! -x $(PYTHON) ] || $(PYTHON) tools/hosts.py clean

distclean: clean ## clean, and what was installed and kept in this folder
	rm -rf .venv .run .mypy_cache .ruff_cache

bootstrap:
	@tools/bootstrap

.PHONY: help demo test lint unit bench docs releases-report lockup-report lock clean distclean bootstrap
