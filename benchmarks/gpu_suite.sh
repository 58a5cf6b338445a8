#!/usr/bin/env bash
# What only a GPU can tell, in one command, under ten minutes and without a network: installs the
# library beside what is there, runs the tests marked gpu, then the benchmarks of KV splicing, of the
# embedded engine's decoding and of the loss, whose table comes last. Needs Python >= 3.11 with torch, triton, transformers, pybind11,
# scikit-build-core, pytest, hypothesis, cmake, ninja and a C++20 compiler.
#
#   benchmarks/gpu_suite.sh [DIRECTORY]
#
# DIRECTORY, by default a new one, gets gpu_tests.log, gpu_tests.xml, kv_splice.jsonl,
# decode_throughput.jsonl, loss_logits.jsonl, loss_kernels.jsonl and the losses' plots. PYTHON names another interpreter than
# python3. THOR_COMMIT: the commit, where this is a copy without history.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fail() {
  echo "gpu_suite: error: $*" >&2
  exit 2
}

[[ $# -le 1 ]] || fail "got $# arguments, expected at most one: the directory for results"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is $("$python" -V 2>&1), expected Python >= 3.11"
"$python" -P -c 'import torch' 2> /dev/null || fail "$python cannot import torch"
"$python" -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  fail "torch sees no GPU: $("$python" -P -c 'import torch; print(torch.__version__)')"
for module in triton transformers pybind11 scikit_build_core pytest hypothesis; do
  "$python" -P -c "import $module" 2> /dev/null || fail "$python cannot import $module"
done
for program in cmake ninja c++; do
  command -v "$program" > /dev/null || fail "there is no $program on PATH"
done

results=${1:-$(mktemp -d -t gpu-suite-XXXXXX)}
mkdir -p "$results"
results=$(cd "$results" && pwd)
if [[ -z ${THOR_COMMIT:-} ]]; then THOR_COMMIT=$(git rev-parse HEAD 2> /dev/null || true); fi
export THOR_COMMIT HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"

echo '=== install, without a network or build isolation'
# pip warns of versions it was not asked to look at; dependencies are what the machine has.
timeout 90 "$python" -m pip install -q --no-index --no-deps --no-build-isolation \
  --no-warn-conflicts --target "$scratch/site" . ||
  fail 'the library cannot be installed, see above'
export PYTHONPATH="$scratch/site"

echo '=== tests marked gpu'
# pyproject.toml's options belong to plugins that may be missing here (pytest-asyncio), so there is
# a configuration of its own. What other packages warn of is shown: their versions are not ours.
cat > "$scratch/pytest.ini" << 'INI'
[pytest]
addopts = -ra --strict-markers --import-mode=importlib -p no:cacheprovider
markers =
    gpu: needs a CUDA device
    slow: takes more than ten seconds
INI
tests=0
timeout 200 "$python" -P -m pytest -c "$scratch/pytest.ini" --rootdir "$PWD" -m gpu \
  --continue-on-collection-errors --junit-xml "$results/gpu_tests.xml" \
  tests/kernels tests/unit/test_decode_graphs_gpu.py 2>&1 | tee "$results/gpu_tests.log" || tests=$?

echo '=== KV splicing benchmark'
splice=0
timeout 60 "$python" benchmarks/kv_splice.py \
  --device cuda --rounds 3 --tokens 256 --tokens 2000 --output "$results/kv_splice.jsonl" || splice=$?

echo '=== decoding benchmark'
decode=0
timeout 45 "$python" benchmarks/decode_throughput.py \
  --device cuda --rounds 3 --batch 1 32 --output "$results/decode_throughput.jsonl" || decode=$?

echo '=== loss benchmark'
bench=0
timeout 40 "$python" benchmarks/loss_kernels.py --logits \
  --device cuda --rounds 3 --tokens 8192 \
  --output "$results/loss_logits.jsonl" || bench=$?
timeout 160 "$python" benchmarks/loss_kernels.py \
  --device cuda --rounds 3 --hidden 4096 --tokens 8192 --tokens 32768 \
  --output "$results/loss_kernels.jsonl" || bench=$?

[[ $splice -eq 0 ]] || echo "gpu_suite: the splicing benchmark ended with status $splice" >&2
[[ $decode -eq 0 ]] || echo "gpu_suite: the decoding benchmark ended with status $decode" >&2
[[ $bench -eq 0 ]] || echo "gpu_suite: the loss benchmark ended with status $bench" >&2
[[ $tests -eq 0 ]] || echo "gpu_suite: the tests ended with status $tests, see $results" >&2
[[ $tests -eq 0 && $splice -eq 0 && $decode -eq 0 && $bench -eq 0 ]]
