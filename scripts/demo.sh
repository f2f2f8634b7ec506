#!/usr/bin/env bash
# The demonstration: kakeya_vllm.demo on the small model and the texts of data/. Arguments are passed on
# (--passages 4, --out FILE).
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
# The demonstration prints what matters by itself: recipe, layers, capacity. vLLM's remarks about this machine would drown it.
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
exec "$PY" -m kakeya_vllm.demo --model .cache/models/smollm2 --data data "$@"
