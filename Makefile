PYTHON ?= python3

.PHONY: venv study report docs test clean

venv: .venv/.installed

# A machine without a GPU saves some gigabytes with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

study: venv
	.venv/bin/potstill study run plans/quick.toml --out study_run/quick
	.venv/bin/python figures/size_score.py study_run/quick
	.venv/bin/potstill report study_run/quick

# One page of the studies whose records are committed, data/results/first/pong/report.html; and what README and docs tell of them.
report: venv
	.venv/bin/potstill report data/results/first/pong data/results/first/minatar-breakout data/results/first/minatar-space-invaders
	.venv/bin/python scripts/front_page.py

# The site in site/index.html: opens from the folder, needs no network.
docs: venv
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

test: venv
	scripts/check

# Runs are results, not build products: they stay.
clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
