#!/usr/bin/env bash
# Every measurement of docs/performance.md on one GPU, most important first, each cut off before it starves the next.
# From the checkout's root, with the peers' packages installed: `bash benchmarks/all_h100.sh [FOLDER]`.
set -u
results=${1:-benchmarks/results}
mkdir -p "$results"

measure() {
  local seconds=$1 name=$2
  shift 2
  echo "== $name"
  timeout -s INT "$seconds" python3 -m "benchmarks.$name" "$@" >"$results/$name.log" 2>&1
  local code=$?
  # Compilers that are cut off print their whole program.
  grep -E '^[A-Za-z].*( ms|GiB|within|refused|NO ROW|MORE THAN)' "$results/$name.log" | cut -c1-240 | tail -40
  echo "== $name ended with $code"
}

peer=transformers_peft_fla
measure 90 moe_layer --only nextune torch_grouped_mm transformers_grouped_mm --out "$results/moe_layer_h100.json"
measure 150 step_memory --out "$results/step_memory_h100.json"
measure 60 deltanet_layer --only nextune --out "$results/deltanet_layer_h100.json"
measure 240 lora_step --warm --only $peer nextune nextune_full_recompute nextune_no_recompute --out "$results/lora_step_h100.json"
measure 300 lora_step --warm --only ${peer}_liger_unsloth ${peer}_liger ${peer}_liger_axolotl --out "$results/lora_step_h100.json"
measure 180 deltanet_layer --out "$results/deltanet_layer_h100.json"
measure 180 loss_curve --out "$results/loss_curve_h100.json"
measure 400 moe_layer --out "$results/moe_layer_h100.json"
