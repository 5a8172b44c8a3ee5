# Sourced by the recipes: MODEL, DATA, INDEX, TEST, OUT from the environment, and `run`, which under --dry_run lets each
# command print its plan for a card of CARD GB instead of running it (bench/plan.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1-}" in
  "") DRY= ;;
  --dry_run) DRY=1 ;;
  *)
    echo "usage: $0 [--dry_run]; MODEL, DATA, INDEX, TEST, OUT, CARD, PYTHON come from the environment" >&2
    exit 2
    ;;
esac
python=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct} CARD=${CARD:-24}
: "${DATA:=data/questions.jsonl}" "${TEST:=data/test.jsonl}" "${INDEX:=data/index}"  # the last by tools.search
run() {
  echo "== $*"
  "$python" "$@" ${DRY:+--dry_run "$CARD"}
}
policy() { if [ "$DRY" ]; then echo "$MODEL"; else echo "$1"; fi; }  # a stage's adapter; dry: its base
