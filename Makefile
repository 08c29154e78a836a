PYTHON ?= python3

.PHONY: venv study report docs test gpu-check clean

venv: .venv/.installed

# pip compiles on one core, a minute of two; here all cores do. Some packages hold files that no Python of today compiles.
# A machine without a GPU saves some gigabytes with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	.venv/bin/python -W ignore -m compileall -qq -j 0 .venv/lib || true
	touch $@

STUDENT = study_run/pong/runs/distill-student_width-1_16_teacher-seed-0_seed-0
FILM = study_run/pong/teacher-and-student.mp4

# The three questions, small but whole, on two cores in less than ten minutes; the largest runs begin first.
study: venv
	.venv/bin/potstill study run plans/quick-pong.toml --out study_run/pong
	.venv/bin/potstill study run plans/quick.toml --out study_run/breakout
	test -f $(FILM) || .venv/bin/potstill watch data/experts/pong/seed-0 $(STUDENT) --max-steps 300 --out $(FILM)
	.venv/bin/potstill report study_run/breakout study_run/pong --out study_run/report.html
	@printf '\nNext, with .venv/bin/ before each:\n'
	@echo '  potstill compress data/experts/pong/seed-0 --keep 0.9    the smallest student that keeps 90 %'
	@echo '  potstill export $(STUDENT) --out student.onnx'
	@echo '  potstill train --env cartpole                            an expert of your own, in a minute'

# One page of the studies whose records are committed, data/results/first/pong/report.html; and what README and docs tell of them.
report: venv
	.venv/bin/potstill report data/results/first/pong data/results/first/minatar-breakout data/results/first/minatar-space-invaders
	.venv/bin/python scripts/front_page.py

# The site in site/index.html: opens from the folder, needs no network.
docs: venv
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

test: venv
	scripts/check

# Trains on a CUDA device and compares it with the CPU. Nobody has run it yet.
gpu-check: venv
	.venv/bin/python scripts/gpu_check.py

# Runs are results, not build products: they stay.
clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
