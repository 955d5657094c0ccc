#!/usr/bin/env bash
# setup.sh ENVIRONMENTS MODEL: installs OpenVINO GenAI and exports the model with float32 weights.
# optimum-intel needs another transformers than the project's, so the export has its own environment.
set -euo pipefail
envs=$1 model=$2
if [ ! -f "$envs/openvino/.done" ]; then
    python3 -m venv --clear "$envs/openvino"
    "$envs/openvino/bin/pip" install --quiet "openvino-genai==2026.4.*"
    touch "$envs/openvino/.done"
fi
if [ ! -f "$envs/openvino-model/openvino_tokenizer.xml" ]; then
    python3 -m venv --clear "$envs/openvino-export"
    "$envs/openvino-export/bin/pip" install --quiet "optimum-intel[openvino]==2.2.*"
    "$envs/openvino-export/bin/optimum-cli" export openvino --model "$model" \
        --task text-generation-with-past --weight-format fp32 "$envs/openvino-model.part"
    rm -rf "$envs/openvino-model"
    mv "$envs/openvino-model.part" "$envs/openvino-model"
    rm -rf "$envs/openvino-export"
fi
