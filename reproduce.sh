#!/usr/bin/env bash
# Set up .venv and run the main job. Flags go to experiments.reproduce: ./reproduce.sh --quick, ./reproduce.sh --seeds 5
set -euo pipefail
cd "$(dirname "$0")"
source setup.sh
echo "== experiments/reproduce.py $*"
exec .venv/bin/python -m experiments.reproduce "$@"
