# The two commands of a fresh machine are `make demo` and `make test`; `make help` lists the rest.
PYTHON  ?= python3
VENV    ?= .venv
RECIPE  ?= custom
DATA    ?=
PRETRAINED ?=
TEACHER_PRETRAINED ?=
TEACHER ?=
STUDENT ?=
DEVICE  ?=
OUT     ?=
TARGET  ?=
KEY     ?=
VERSION ?=
ARGS    ?=

YC := $(VENV)/bin/yolo-compress
PY := $(VENV)/bin/python
SET := recipe='$(RECIPE)' \
  $(if $(DATA),data.yaml='$(DATA)') $(if $(TEACHER),teacher.weights='$(TEACHER)') \
  $(if $(STUDENT),baseline.weights='$(STUDENT)') $(if $(PRETRAINED),baseline.pretrained='$(PRETRAINED)') \
  $(if $(TEACHER_PRETRAINED),teacher.pretrained='$(TEACHER_PRETRAINED)') $(if $(DEVICE),run.device='$(DEVICE)') $(ARGS)

HOLD := $(or $(YOLO_COMPRESS_HOME),.)
MADE := weights/store weights/.cache weights/.lock datasets/digits datasets/digits.partial datasets/digits.lock
PYTEST := $(PY) -m pytest -n 2 --no-loadscope-reorder

STAGES := baseline teacher sparsify prune distill qat export bench report

.PHONY: help setup demo test check style fast-tests slow-tests real-test all engine bundle status cfg gc clean $(STAGES)
.DEFAULT_GOAL := help

help: ## list targets and variables
	@echo "make TARGET [RECIPE=$(RECIPE)] [DATA=my.yaml] [PRETRAINED=yolov8s.pt] [DEVICE=0] [ARGS=\"section.key=value ...\"]"
	@echo "make prune distill qat engine runs each stage and whatever it needs; what is up to date is reused."
	@echo
	@grep -hE '^[a-z$$ ()A-Z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sed 's/$$(STAGES)/$(STAGES)/' | expand -t 12
	@echo
	@echo "RECIPE   a shipped recipe or a .yaml file         DATA     data.yaml             DEVICE  run.device"
	@echo "PRETRAINED          baseline.pretrained: a checkpoint of any classes, trained on DATA first"
	@echo "TEACHER_PRETRAINED  teacher.pretrained, likewise"
	@echo "STUDENT, TEACHER    baseline.weights, teacher.weights: finished detectors of the classes of DATA"
	@echo "ARGS     any knobs, ARGS=\"section.key=value ...\" (yolo-compress help STAGE lists them)"

setup: $(VENV)/.complete ## make .venv with everything pinned in constraints.txt

$(VENV)/.complete: pyproject.toml constraints.txt
	@flock $(CURDIR)/constraints.txt ./scripts/setup.sh '$(PYTHON)' '$(VENV)'

demo: setup ## the whole chain on the embedded digits, on the CPU, in under 20 minutes
	@$(YC) run recipe=digits $(ARGS)

test: fast-tests slow-tests ## every test that needs neither GPU, network nor real images, in about 10 minutes on 2 cores

check: style fast-tests ## ruff, mypy and the fast tests, in a few minutes

style: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

fast-tests: setup
	@$(PYTEST) -m 'not slow and not gpu and not network and not real'

slow-tests: setup
	@$(PYTEST) -m 'slow and not gpu and not network and not real'

real-test: setup ## the tests on real images and checkpoints, in YOLO_COMPRESS_DATA and YOLO_COMPRESS_WEIGHTS
	@$(PYTEST) -m 'real and not gpu and not network'

$(STAGES): setup ## one stage and what it needs
	@$(YC) $@ $(SET)

engine: setup ## engines for every runtime found here, then bench and its table
	@$(YC) engine $(SET) > /dev/null
	@$(YC) bench $(SET)

bundle: setup ## everything a robot needs, as OUT (a folder or .tar); TARGET, KEY and VERSION as `yolo-compress help bundle` says
	@$(YC) bundle $(SET) out='$(or $(OUT),bundle-$(basename $(notdir $(RECIPE))))' $(if $(TARGET),target='$(TARGET)') \
	  $(if $(KEY),key='$(KEY)') $(if $(VERSION),version='$(VERSION)')

all: setup ## everything, up to the report
	@$(YC) run $(SET)

status cfg: setup ## what is up to date and what is stale, and why; the effective recipe
	@$(YC) $@ $(SET)

gc: setup ## delete artefacts that no recipe refers to
	@$(YC) gc

clean: ## delete artefacts, the drawn digits and caches; never source weights
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf $(addprefix '$(HOLD)'/,$(MADE))
	[ ! -d '$(HOLD)/weights' ] || find '$(HOLD)/weights' -mindepth 2 -maxdepth 2 -type l -delete
	[ ! -d '$(HOLD)/weights' ] || find '$(HOLD)/weights' -mindepth 1 -maxdepth 1 -type d -empty -delete
