#!/usr/bin/env bash
# The kernels' interpreter tests under another version of Triton than the one installed:
#   scripts/interpret_with_triton.sh 3.6.0
# Everything but Triton and numpy comes from the environment of the python on PATH, which is left as
# it is. Triton before 3.7 needs numpy before 2.4 (a loop's bound is an array of one element).
set -euo pipefail
version=${1:?usage: $0 VERSION of Triton, such as 3.6.0 or 3.9.0}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python -m venv --without-pip "$scratch/venv"
here=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
there=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python -m pip install -q --no-deps --target "$there" "triton==$version" 'numpy<2.4'
# After what is in $there, and with the .pth files that make an editable install.
echo "import site; site.addsitedir('$here')" > "$there/installed.pth"

export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
"$scratch/venv/bin/python" -c 'import triton; print("triton", triton.__version__)'
for suite in tests/kernels/interpreted_*.py; do
  "$scratch/venv/bin/python" -P -m pytest -q -p no:cacheprovider "$suite"
done
