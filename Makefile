# `make demo` and `make test` work on a fresh machine with Python 3.11 or 3.12, make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(patsubst plugins/%/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
DEMO := demo-output
SOURCES := conftest.py pytest_ourvidz.py ourvidz_core $(PLUGINS:%=plugins/%) examples tests benchmarks docs deploy
# Anew each time, for pages that did not change are not warned about again, and pages that went would stay.
SITE = rm -rf site && $(BIN)/python -m sphinx --quiet --fail-on-warning docs site && $(BIN)/python docs/check_site.py site
# Weights and vocabularies hold no secrets and take long to read; a made-up secret says that it is one.
SECRETS = git ls-files -z | xargs -0 -r -P 2 -n 250 $(BIN)/detect-secrets-hook --no-verify \
	--exclude-files '^examples/models/demo_models/|\.(png|svg|jpg|mp4)$$' \
	--exclude-secrets '(?i)canary|secret|passw|p%40ss|s3cret|hunter2|whsec_(abc%)?$$|SERVICE_KEY$$|^OURVIDZ_|^(bin|chaos|new|tok)$$'
# One thread for each process of torch: the suite runs as many processes as there are cores.
export OMP_NUM_THREADS ?= 1
# The suite starts hundreds of processes: what one of them has compiled, the next need not compile again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check audit format docs dist benchmarks clean

# A worker for each core, up to four, for each takes a gigabyte of memory: one job on two cores is slower than two
# jobs on one each.
demo: WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((cores < 4 ? cores : 4)))
demo: $(VENV)/installed
	OURVIDZ_SDXL_MODEL=demo OURVIDZ_WAN_CKPT_DIR=demo OURVIDZ_ENHANCER_MODEL=demo \
		$(BIN)/ourvidz --log-level warning demo --messages examples/demo --workers $(WORKERS) --out $(DEMO)

# A test that kills processes on a busy machine may miss its moment once: it gets one more try, and is listed as rerun.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --reruns 1

check: $(VENV)/installed
	$(BIN)/ruff format $(if $(CI),--check) $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy ourvidz_core pytest_ourvidz.py
	$(BIN)/mypy $(PLUGINS:%=-p ourvidz_%)
	$(BIN)/lint-imports
	$(SECRETS)
	$(BIN)/python docs/generate.py --check
	$(SITE)

# Asks the advisories of pypi.org, so it needs the internet; a package that they do not know is a failure, too.
audit: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > $(VENV)/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/installed.txt

docs: $(VENV)/installed
	$(BIN)/python docs/generate.py
	$(SITE)

# Under a minute: only what needs no torch is installed with all that it needs.
dist: $(VENV)/installed
	$(BIN)/python deploy/dist.py
	$(BIN)/python deploy/check_dockerfile.py

benchmarks: $(VENV)/installed
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python -m benchmarks.chaos
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python -m benchmarks.up_soak
	$(BIN)/python -m benchmarks.scale

clean:
	rm -rf $(VENV) $(DEMO) site dist

$(VENV)/installed: pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml examples/*/pyproject.toml examples/models/*/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		|| { echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev \
		--editable '.[embedded,video]' $(PLUGINS:%=--editable plugins/%) --editable examples/acme-upscale --editable examples/models/demo_models
	touch $@
