#!/usr/bin/env bash
# Makes the two environments that Tiercel needs, from pinned lists, with plain pip:
#   .venv         the product: gateway, quantize, tiercel_agents, tests
#   .venv-engine  vLLM, whose pins nobody should share (CPU build without a CUDA GPU, else the CUDA build)
# Safe to run again at any time; does nothing when both are as the lists say.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0
VLLM=0.32.0
# Used only where the configured package index has no CPU build of torch.
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
NEED_DISK_GB=8
NEED_MEMORY_GB=10

fail() { echo "setup: $*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or later with the venv module is needed and none was found; install it, or set PYTHON=/path/to/python"
}

python=$(find_python)
[ -n "$python" ] || exit 1
# The product's own detector, which needs no package: it is right in containers and under WSL2 as well.
build=$("$python" -c 'from quantize.core.gpus import ask_gpus; print("cuda" if ask_gpus(["name"]) else "cpu")')

# What an environment is made from; when this changes, it is made again.
stamp_of() { # environment
  cat "$0" "deploy/constraints/$1.txt" pyproject.toml agents/pyproject.toml | sha256sum | cut -c1-24
  "$python" -c 'import sys; print(sys.version_info[:2])'
  echo "$build"
}
fresh() { [ -f "$1/.setup-stamp" ] && [ "$(cat "$1/.setup-stamp")" = "$(stamp_of "$2")" ]; }

wanted=()
fresh .venv product || wanted+=(product)
fresh .venv-engine engine-cpu || wanted+=(engine)
if [ ${#wanted[@]} -eq 0 ]; then
  echo "setup: .venv and .venv-engine are up to date"
  exit 0
fi

free_gb=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
[ "$free_gb" -ge "$NEED_DISK_GB" ] ||
  fail "$free_gb GB of disk are free here and $NEED_DISK_GB GB are needed; free some and run this again"
memory_gb=$(awk '/^MemTotal/ {print int($2 / 1048576 + 0.5)}' /proc/meminfo)
[ "$memory_gb" -ge "$NEED_MEMORY_GB" ] ||
  fail "this machine has $memory_gb GB of memory and $NEED_MEMORY_GB GB are needed for the engines"

mkdir -p var/log
pip_install() { # environment, arguments of pip install
  local env=$1
  shift
  # Without --no-compile pip would compile 100,000 modules, most of which nothing ever imports.
  "$env/bin/python" -m pip --disable-pip-version-check install --quiet --no-input --no-compile "$@"
}

install_torch() { # environment
  if [ "$build" = cuda ]; then
    pip_install "$1" "torch==$TORCH"
  elif ! pip_install "$1" --no-deps "torch==$TORCH+cpu" 2>/dev/null; then
    pip_install "$1" --no-deps --index-url "$TORCH_CPU_INDEX" "torch==$TORCH+cpu"
  fi
}

make_product() {
  rm -f .venv/.setup-stamp
  "$python" -m venv .venv
  install_torch .venv
  pip_install .venv --no-deps -r deploy/constraints/product.txt
  pip_install .venv --no-deps --no-build-isolation --editable . --editable agents
  stamp_of product >.venv/.setup-stamp
}

make_engine() {
  rm -f .venv-engine/.setup-stamp
  "$python" -m venv .venv-engine
  if [ "$build" = cuda ]; then
    pip_install .venv-engine "vllm==$VLLM" "torch==$TORCH"
  else
    # --no-deps: vLLM's requirements pull CUDA builds of torchvision, torchaudio, torchcodec and
    # triton, with which `import transformers` fails; text models need none of them.
    install_torch .venv-engine
    pip_install .venv-engine --no-deps -r deploy/constraints/engine-cpu.txt
    .venv-engine/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec triton 2>/dev/null
  fi
  stamp_of engine-cpu >.venv-engine/.setup-stamp
}

began=$SECONDS
pids=()
trap 'for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done' EXIT
for name in "${wanted[@]}"; do
  echo "setup: making the $name environment ($build build), log in var/log/setup-$name.log"
  "make_$name" >"var/log/setup-$name.log" 2>&1 &
  pids+=($!)
done
free_mb() { df -Pm . | awk 'NR==2 {print $4}'; }
before=$(free_mb)
waited=0
while sleep 1; do
  alive=0
  for pid in "${pids[@]}"; do if kill -0 "$pid" 2>/dev/null; then alive=1; fi; done
  [ "$alive" = 1 ] || break
  waited=$((waited + 1))
  [ $((waited % 10)) -eq 0 ] || continue
  printf 'setup: %3d s, %d MB written (both environments take about 3700)\n' \
    $((SECONDS - began)) $((before - $(free_mb)))
done
for i in "${!pids[@]}"; do
  name=${wanted[$i]}
  wait "${pids[$i]}" || fail "the $name environment could not be made: $(tail -n 3 "var/log/setup-$name.log" | tr '\n' ' ')(whole log: var/log/setup-$name.log; running this again goes on)"
done
trap - EXIT
echo "setup: done in $((SECONDS - began)) s"
