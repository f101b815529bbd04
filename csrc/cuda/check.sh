#!/bin/sh
# Compiles csrc/cuda with nvcc for every architecture it is built for, which needs no GPU, and checks ops.cpp against the
# headers of the torch of $PYTHON. What was checked before and has not changed since is not compiled again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$here/../../build/cuda-check
for nvcc in "${CUDA_HOME:-}/bin/nvcc" /usr/local/cuda/bin/nvcc "$(command -v nvcc || true)"; do
  test -x "$nvcc" && break
done
if ! test -x "$nvcc"; then
  echo "cuda-check: left out: there is no nvcc here (looked in CUDA_HOME, /usr/local/cuda and PATH)"
  exit 0
fi
mkdir -p "$out"
"$nvcc" --version >"$out/compiler.new"
cmp -s "$out/compiler" "$out/compiler.new" || rm -f "$out"/*.o "$out/ops.checked"
mv "$out/compiler.new" "$out/compiler"

newer() { # is any of the files from the second on newer than the first, or the first not there?
  product=$1
  shift
  test -e "$product" || return 0
  for source in "$@"; do
    test "$source" -nt "$product" && return 0
  done
  return 1
}

for source in "$here"/*.cu; do
  name=$(basename "$source" .cu)
  for architecture in 80 90a; do
    object=$out/$name.$architecture.o
    newer "$object" "$source" "$here/kernels.h" "$0" || continue
    echo "cuda-check: $name.cu for sm_$architecture"
    "$nvcc" -O3 -Werror all-warnings -Xcompiler -Wall,-Werror \
      -gencode=arch=compute_$architecture,code=sm_$architecture -c "$source" -o "$object.new"
    mv "$object.new" "$object"
  done
done

include=$("${PYTHON:-python3}" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "include")')
if newer "$out/ops.checked" "$here/ops.cpp" "$here/kernels.h" "$here/../triangle.h" "$include/torch/version.h" "$0"; then
  echo "cuda-check: ops.cpp against the headers in $include"
  # The macro stands for a header that only a torch for CUDA has
  ${CXX:-g++} -std=c++20 -fsyntax-only -Wall -Werror -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE -isystem "$include" \
    -isystem "$include/torch/csrc/api/include" -isystem "$(dirname "$nvcc")/../include" "$here/ops.cpp"
  touch "$out/ops.checked"
fi
echo "cuda-check: passed"
