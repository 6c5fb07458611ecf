#!/usr/bin/env bash
# What kdjax needs beside JAX, torch, transformers and SGLang, in one folder, for a machine without a network:
#
#   benchmarks/gpu/pack.sh FOLDER [VERSION [PACKAGE…]]    where there is one; VERSION is that machine's Python (3.12)
#   PYTHONPATH=FOLDER:. python -m benchmarks.gpu          there, in a copy of the repository
#
# 160 MB; named PACKAGEs are taken alone, where the machine has most of them: grain, portpicker, array-record, pydantic,
# pydantic-core, annotated-types, typing-inspection, platformdirs and liger-kernel are few MB, and rare.
# Versions are those of requirements/gpu-constraints.txt; wheels are for Linux on x86_64.
set -euo pipefail
out=${1:?usage: benchmarks/gpu/pack.sh FOLDER [VERSION [PACKAGE…]]}
version=${2:-3.12}
root=$(cd "$(dirname "$0")/../.." && pwd)

packages=(
  flax optax orbax-checkpoint grain jaxtyping pydantic platformdirs rich
  liger-kernel  # to be measured against
  # and what those import
  absl-py aiofiles annotated-types array-record cloudpickle etils fsspec humanize markdown-it-py
  mdurl msgpack portpicker prometheus-client protobuf psutil pydantic-core pygments PyYAML simplejson
  tensorstore treescope typing-extensions typing-inspection uvloop wadler-lindig zipp
)
if [ $# -gt 2 ]; then packages=("${@:3}"); fi
platforms=()
for tag in 2_39 2_34 2_31 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
python3 -m pip install --quiet --disable-pip-version-check --target "$out" --upgrade --no-deps \
  --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 \
  --constraint "$root/requirements/gpu-constraints.txt" "${packages[@]}"
du -sh "$out"
