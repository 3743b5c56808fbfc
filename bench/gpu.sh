#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes, without a network:
#   bench/gpu.sh              or, with wheels of rivals in a folder,  FASTRLHF_WHEELS=.whl bench/gpu.sh
# 1. unpacks the wheels in FASTRLHF_WHEELS, if given, into a folder of its own; 2. builds csrc when nvcc is there;
# 3. runs the tests that need a GPU; 4. trains the debug configurations (pretrain, SFT, reward model, PPO), when
# megatron-core and pydantic are there, and times steps of SFT, reward model and PPO of a 1.3B model; 5. runs the kernel
# benchmarks, each op in a process of its own, so that a rival that breaks the CUDA context takes nothing else along, in
# the time that is left; 6. prints the tables.
# A part that fails is reported and the rest continues; the exit status is then 1. Results (kernels.csv, kernels.svg,
# end_to_end.csv, *.log, summary.txt) go to $OUT, or else to bench/results/<name of the GPU>.
#   FASTRLHF_SECONDS=520    time for everything; parts that no longer fit are left out and named
#   FASTRLHF_OPS="gae ..."  only these benchmarks;  FASTRLHF_SKIP="build tests training end-to-end" leaves parts out
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
SECONDS=0
TOTAL=${FASTRLHF_SECONDS:-520}
PYTHON=${PYTHON:-python3}
SKIP=" ${FASTRLHF_SKIP:-} "
# The short ones first: the time that they leave over goes to the long ones.
OPS=${FASTRLHF_OPS:-"gae ppo_loss pairwise_ranking_loss linear_ppo_loss linear_cross_entropy logprobs_entropy \
linear_logprobs_recompute logprobs linear_logprobs logits_kl"}
RESERVE=25 # seconds kept for the report
FAILED=()

if ! command -v nvidia-smi >/dev/null; then
  echo "bench/gpu.sh: no nvidia-smi here; this needs an NVIDIA GPU (on a CPU: python -m bench)" >&2
  exit 1
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9\n' - | tr 'A-Z' 'a-z')
OUT=${OUT:-bench/results/$GPU}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
# A file named by this run: results measured before stay where they are.
CSV_FOLDER=$OUT
for file in kernels end_to_end; do
  [ -e "$OUT/$file.csv" ] && mv "$OUT/$file.csv" "$OUT/$file.before-$(date +%Y%m%d-%H%M%S).csv"
done

left() { echo $((TOTAL - RESERVE - SECONDS)); }

# part NAME SECONDS LOG COMMAND...: run within the time left; the log keeps everything, the screen its last lines.
part() {
  local name=$1 most=$2 log=$OUT/$3 limit status began=$SECONDS
  shift 3
  limit=$(left)
  [ "$limit" -gt "$most" ] && limit=$most
  if [ "$limit" -lt 10 ]; then
    echo "=== $name: left out, no time"
    FAILED+=("$name (no time)")
    return 1
  fi
  echo "=== $name (at most $limit s)"
  echo "=== $name" >>"$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  tail -n "${LINES_SHOWN:-3}" "$log" | cut -c 1-200
  [ $status -eq 124 ] && echo "stopped after $limit s"
  if [ $status -ne 0 ]; then
    FAILED+=("$name (status $status)")
    grep -nE '^(E  |ERROR|FAILED|--- .* failed|[A-Za-z_.]*(Error|Exception): )' "$log" | tail -n 8 | cut -c 1-220
  fi
  echo "    $((SECONDS - began)) s, status $status"
  return $status
}

about() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv
  command -v nvcc && nvcc --version | tail -n 2
  "$PYTHON" - <<'PY'
import importlib.metadata as m, platform
names = ("torch", "triton", "megatron-core", "transformers", "liger-kernel", "quack-kernels", "cut-cross-entropy", "trl", "flash-attn", "pytest")
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return "-"
print("python", platform.python_version(), *(f"{n} {version(n)}" for n in names), sep="; ")
PY
}

wheels() { # --target, so that nothing of the machine's own Python is replaced
  local wheel status=0 install=("$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir)
  "${install[@]}" --target "$2" "$1"/*.whl && return 0
  for wheel in "$1"/*.whl; do # one that does not fit this Python stops all of them; the others still do
    "${install[@]}" --upgrade --target "$2" "$wheel" || { echo "ERROR: $wheel does not install" && status=1; }
  done
  return $status
}
build() { # an old setuptools would stop at unknown fields of pyproject.toml; these links have none
  local folder
  folder=$(mktemp -d) || return 1
  ln -s "$PWD/setup.py" "$PWD/csrc" "$PWD/fastrlhf" "$PWD/kernels" "$folder"
  # forced: a toolkit of another version than torch's links its own runtime, and the kernels need no other
  (cd "$folder" && FASTRLHF_FORCE_CUDA=1 "$PYTHON" setup.py build_ext --inplace)
  local status=$?
  rm -rf "$folder"
  return $status
}
training() { # the commands that a user runs, one after the other: each starts from what the one before it saved
  local root=$PWD folder
  folder=$(mktemp -d) && cd "$folder" || return 1
  "$PYTHON" "$root/configs/debug/make_data.py" || return 1
  for command in pretrain sft rm ppo; do
    echo "--- $command" && "$PYTHON" -W ignore -m fastrlhf $command "$root/configs/debug/$command.yaml" \
      log.progress=false log.tensorboard=false || return 1
    tail -n 1 "runs/debug/$command/metrics.jsonl"
  done
  rm -rf "$folder"
}
head_memory() {
  "$PYTHON" -m bench head-memory --dtype bf16 --tokens 8192 --length 1024 --hidden 1024 --vocab 128256
}
export -f about build wheels training head_memory
export PYTHON

LINES_SHOWN=8 part "machine" 60 gpu.log bash -c about
if [ -n "${FASTRLHF_WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  # after the machine's own packages would be safer, but PYTHONPATH goes before: carry only what is missing there
  part "wheels" 60 gpu.log bash -c 'wheels "$@"' _ "$FASTRLHF_WHEELS" "$SITE"
  export PYTHONPATH="$PYTHONPATH:$SITE" # with what did install
fi
if [[ $SKIP != *" build "* ]]; then
  if command -v nvcc >/dev/null && [ -d csrc ]; then
    part "build of csrc" 150 build.log bash -c build
    grep "is left out" "$OUT/build.log" && FAILED+=("build of csrc (an extension was left out)")
  else
    echo "=== build of csrc: left out, no nvcc here"
  fi
fi
part "backends" 60 gpu.log "$PYTHON" -c 'import json, fastrlhf.ops as o; print(json.dumps(o.backends(), indent=1))'
if [[ $SKIP != *" tests "* ]]; then
  folders=()
  for folder in tests/gpu tests/ops tests/csrc; do [ -d $folder ] && folders+=("$folder"); done
  part "tests, gpu" 110 tests.log "$PYTHON" -m pytest -m gpu -p no:cacheprovider -rs \
    --continue-on-collection-errors "${folders[@]}"
  part "tests, ops on triton" 90 tests.log "$PYTHON" -m pytest -m "not gpu" -p no:cacheprovider -k triton \
    --continue-on-collection-errors tests/ops
fi
if [[ $SKIP != *" training "* ]]; then
  if "$PYTHON" -c 'import megatron.core, pydantic' 2>>"$OUT/training.log"; then
    LINES_SHOWN=8 part "training" 100 training.log bash -c training
    part "memory of the LM head" 40 training.log bash -c head_memory
  else
    echo "=== training: left out, megatron-core or pydantic is not installed"
  fi
fi
waiting=$(wc -w <<<"$OPS")
if [[ $SKIP != *" end-to-end "* ]]; then
  if "$PYTHON" -c 'import megatron.core, pydantic' 2>>"$OUT/end_to_end.log"; then
    share=$(($(left) - 12 * waiting)) # no op can be timed in less
    share=$((share > 170 ? 170 : share < 75 ? 75 : share))
    # added to the budget: imports, and what had begun before it was spent
    LINES_SHOWN=40 part "end to end" $share end_to_end.log "$PYTHON" -m bench end-to-end \
      --budget $((share - 65)) --iterations 2 --out "$CSV_FOLDER"
  else
    echo "=== end to end: left out, megatron-core or pydantic is not installed"
  fi
fi
for op in $OPS; do
  share=$(($(left) / waiting)) # what one leaves over goes to those after it
  part "bench $op" $((share + 15)) bench.log "$PYTHON" -m bench "$op" --device cuda --seconds 0.4 --rounds 40 \
    --budget $((share > 20 ? share - 10 : 10)) --patience $((share > 30 ? share / 2 : 15)) --out "$CSV_FOLDER"
  waiting=$((waiting - 1))
done
echo "=== results"
"$PYTHON" -m bench report --device cuda --out "$CSV_FOLDER" >"$OUT/summary.txt" 2>&1 || FAILED+=("report")
nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw --format=csv,noheader
cat "$OUT/summary.txt"
echo "=== $SECONDS s"
if [ ${#FAILED[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${FAILED[@]}"
  exit 1
fi
echo "all parts passed"
