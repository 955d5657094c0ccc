#!/usr/bin/env bash
# setup.sh ENVIRONMENTS MODEL PYTHON: builds llama-batched-bench from the sources that llama-cpp-python ships
# and converts the model to a GGUF of float32 (PYTHON has torch and transformers). Needs cmake and a C++ compiler. A build that was
# interrupted goes on where it stopped.
set -euo pipefail
envs=$1/llama.cpp model=$2 python=$3
mkdir -p "$envs"
if [ ! -d "$envs/source" ]; then
    python3 -m pip download --quiet --no-deps --no-binary :all: -d "$envs" "llama-cpp-python==0.3.36"
    mkdir -p "$envs/unpacked"
    tar -xzf "$envs"/llama_cpp_python-*.tar.gz -C "$envs/unpacked" --strip-components 1
    mv "$envs/unpacked/vendor/llama.cpp" "$envs/source"
    rm -rf "$envs/unpacked" "$envs"/llama_cpp_python-*.tar.gz
fi
if [ ! -x "$envs/build/bin/llama-batched-bench" ]; then
    cmake -S "$envs/source" -B "$envs/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build "$envs/build" -j2 --target llama-batched-bench
fi
if [ ! -f "$envs/f32.gguf" ]; then
    "$python" -m pip install --quiet --no-deps --target "$envs/sentencepiece" sentencepiece
    PYTHONPATH="$envs/sentencepiece" "$python" "$envs/source/convert_hf_to_gguf.py" "$model" --outtype f32 \
        --outfile "$envs/f32.gguf.part"
    mv "$envs/f32.gguf.part" "$envs/f32.gguf"
fi
