#!/usr/bin/env bash
# Records the output that README.md quotes: `bash docs/record_samples.sh`, five minutes on two idle cores.
# tests/test_samples.py compares README.md with what is recorded in docs/samples, and (slow) that with a new run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

rm -rf runs/tiny
./launch.sh | sed "s|$PWD/||g" >docs/samples/tiny.txt

# A rule stops this one: exit code 2.
.venv/bin/python finetune/train.py --recipe recipes/tiny.yaml --set name=collapse --set output.dir="$runs" \
  --set parallel.ranks=1 --set parallel.expert=1 --set monitor.wandb=off \
  --set router.train=true --set optim.lr=1e-1 --set optim.schedule=constant \
  --set train.steps=24 --set train.log_every_steps=2 --set train.eval_every_steps=4 \
  --set monitor.routing_every_steps=2 --set monitor.drift_every_steps=2 --set checkpoint.every_steps=24 \
  2>&1 | grep -E '^(step [0-9]|nextune: step)' >docs/samples/collapse.txt || true
