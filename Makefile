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

# A value reaches the shell in single quotes. Neither make nor the shell expands what is in it, such as $(shell ...).
VALUES := PYTHON VENV RECIPE DATA PRETRAINED TEACHER_PRETRAINED TEACHER STUDENT DEVICE OUT TARGET KEY VERSION
define NEWLINE


endef
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
$(foreach name,$(VALUES) ARGS YOLO_COMPRESS_HOME,$(eval override $(name) := $$(value $(name))))
$(foreach name,$(VALUES) YOLO_COMPRESS_HOME,$(if $(findstring $(NEWLINE),$($(name))),$(error $(name) has a line break)))
quote = '$(subst ','\'',$(1))'
given = $(if $($(2)),$(1)=$(call quote,$($(2))))

YC := $(call quote,$(VENV)/bin)/yolo-compress
PY := $(call quote,$(VENV)/bin)/python
WORDS := $(foreach word,$(ARGS),$(call quote,$(word)))
SET := recipe=$(call quote,$(RECIPE)) \
  $(call given,data.yaml,DATA) $(call given,teacher.weights,TEACHER) $(call given,baseline.weights,STUDENT) \
  $(call given,baseline.pretrained,PRETRAINED) $(call given,teacher.pretrained,TEACHER_PRETRAINED) \
  $(call given,run.device,DEVICE) $(WORDS)
NAME := $(subst <space>,$(SPACE),$(basename $(notdir $(subst $(SPACE),<space>,$(RECIPE)))))

HOLD := $(or $(YOLO_COMPRESS_HOME),.)
MADE := weights/store weights/.cache weights/.lock datasets/digits datasets/digits.partial datasets/digits.lock
PYTEST := $(PY) -m pytest -n 2 --no-loadscope-reorder

STAGES := baseline teacher sparsify prune distill qat export bench control report

.PHONY: help setup demo test check style fast-tests slow-tests real-test gpu-test fuzz all engine bundle status cfg gc clean $(STAGES)
.DEFAULT_GOAL := help

help: ## list targets and variables
	@echo "make TARGET [RECIPE=custom] [DATA=my.yaml] [PRETRAINED=yolov8s.pt] [DEVICE=0] [ARGS=\"section.key=value ...\"]"
	@echo "make prune distill qat engine runs each stage and whatever it needs; what is up to date is reused."
	@echo
	@grep -hE '^[a-z$$ ()A-Z-]+:.*## ' $(call quote,$(strip $(MAKEFILE_LIST))) | sed -E 's/:.*## /\t/' | sed 's/$$(STAGES)/$(STAGES)/' | expand -t 12
	@echo
	@echo "RECIPE   a shipped recipe or a .yaml file         DATA     data.yaml             DEVICE  run.device"
	@echo "PRETRAINED          baseline.pretrained: a checkpoint of any classes, trained on DATA first"
	@echo "TEACHER_PRETRAINED  teacher.pretrained, likewise"
	@echo "STUDENT, TEACHER    baseline.weights, teacher.weights: finished detectors of the classes of DATA"
	@echo "ARGS     any knobs, ARGS=\"section.key=value ...\" (yolo-compress help STAGE lists them); a value has no spaces"

setup: ## make .venv with everything pinned in constraints.txt
	@flock constraints.txt ./scripts/setup.sh $(call quote,$(PYTHON)) $(call quote,$(VENV))

demo: setup ## the whole chain on the embedded digits, on the CPU, in under 20 minutes
	@$(YC) run recipe=digits $(WORDS)

test: fast-tests slow-tests ## every test that needs neither GPU, network nor real images, in less than 20 minutes on 2 cores

check: style fast-tests ## ruff, mypy and the fast tests, in a few minutes

style: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

fast-tests: setup
	@$(PYTEST) -m 'not slow and not gpu and not network and not real'

slow-tests: setup
	@$(PYTEST) -m 'slow and not gpu and not network and not real'

real-test: setup ## the tests on real images and checkpoints, in YOLO_COMPRESS_DATA and YOLO_COMPRESS_WEIGHTS
	@$(PYTEST) -m 'real and not gpu and not network'

gpu-test: setup ## the tests that need a CUDA GPU, and a table of what they found; please send us the table
	@$(PY) -m pytest -m 'gpu and not network and not real'

fuzz: setup ## 20,000 altered inputs through every door of the product, in some minutes; ARGS="CASES SEED DOOR ..." for others
	@$(PY) -m tests.fuzz $(WORDS)

$(STAGES): setup ## one stage and what it needs
	@$(YC) $@ $(SET)

engine: setup ## engines for every runtime found here, then bench and its table
	@$(YC) engine $(SET) > /dev/null
	@$(YC) bench $(SET)

bundle: setup ## everything a robot needs, as OUT (a folder or .tar); TARGET, KEY and VERSION as `yolo-compress help bundle` says
	@$(YC) bundle $(SET) out=$(call quote,$(or $(OUT),bundle-$(NAME))) $(call given,target,TARGET) $(call given,key,KEY) \
	  $(call given,version,VERSION)

all: setup ## everything, up to the report
	@$(YC) run $(SET)

status cfg: setup ## what is up to date and what is stale, and why; the effective recipe
	@$(YC) $@ $(SET)

gc: setup ## delete artefacts that no recipe refers to
	@$(YC) gc $(SET)

clean: ## delete artefacts, the drawn digits and caches; never source weights
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf -- $(foreach made,$(MADE),$(call quote,$(HOLD)/$(made)))
	[ ! -d $(call quote,$(HOLD)/weights) ] || { cd -- $(call quote,$(HOLD)/weights) && \
	  find . -mindepth 2 -maxdepth 2 -type l -delete && find . -mindepth 1 -maxdepth 1 -type d -empty -delete; }
