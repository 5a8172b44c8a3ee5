#!/usr/bin/env bash
# Everything that needs a GPU, in one call on a machine with torch, Triton, transformers and peft installed: versions,
# kernel tests, kernel benchmark, rollout and training step on the 7B shape with random weights (4-bit if bitsandbytes
# is there, else bf16). Each part has its own time limit, and what it measured until then stays in OUTPUT_FOLDER.
# Usage: bench/gpu.sh OUTPUT_FOLDER [PART…]; parts: tests kernels step rollout, all by default.
# PYTHON=… names the interpreter, SHAPE=… another shape (data/tiny runs the last two parts on a CPU).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${1:?usage: bench/gpu.sh OUTPUT_FOLDER [PART…]}
shift
mkdir -p "$out"
failed=0

run() {  # name, seconds, command…
  local name=$1 seconds=$2
  shift 2
  case " ${parts[*]} " in *" ${name%%_*} "*) ;; *) return ;; esac
  echo "== $name: $*"
  timeout --kill-after=20 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then echo "== $name: exit code $status (124, 137: over $seconds s)"; failed=1; fi
}

parts=("$@")
[ $# -gt 0 ] || parts=(tests kernels step rollout)
"$python" - <<'END' | tee "$out/versions.log"
import importlib.metadata as m, platform
import torch
for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl"):
    print(name, next((d.version for d in m.distributions(name=name)), "not installed"))
print("python", platform.python_version(), torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
END

four_bit=(--load_in_4bit)
if ! "$python" -c 'import bitsandbytes' 2> /dev/null; then
  echo "== bitsandbytes does not import: bf16 lines only" | tee -a "$out/versions.log"
  four_bit=()
fi
shape=(--random_init "${SHAPE:-Qwen2.5-7B}" "${four_bit[@]}")

run tests 400 "$python" -m pytest tests/test_kernels_*.py -m "not slow"
run kernels 600 "$python" -m bench.kernels --output "$out/kernels"
run step 400 "$python" -m bench.step "${shape[@]}" --gradient_checkpointing --max_tokens_per_micro_batch 8192 \
  --output "$out/step"
run rollout 500 "$python" -m bench.rollout "${shape[@]}" --slots 64 \
  --turns 4 --waves 1 --repeats 1 --output "$out/rollout"
exit $failed
