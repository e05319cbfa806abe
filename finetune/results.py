"""What comes out of a run: the exported checkpoint, and the closing summary."""

from pathlib import Path
from typing import Any

from finetune.checkpoint.adapter import export_adapter
from finetune.checkpoint.fingerprint import is_of
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.merged import export_merged
from finetune.checkpoint.resume import chosen_checkpoint, open_state
from finetune.checkpoint.trained import split_trained
from finetune.checkpoint.weights import resolve_model
from finetune.evaluation import paired_change
from finetune.planner import model_config
from finetune.run_folder import finished_step, recipe_of
from monitoring.metrics import read_metrics
from monitoring.routing import read_snapshot, recorded_drift, routing_measures
from monitoring.table import print_utilisation

NEVER_BETTER = "training never improved on the base: no held-out loss is below that before the first step"


def export_run(run: Path, to: Path, *, kind: str, which: str = "newest") -> int:
    """Export a checkpoint of a run, as one merged model or as an adapter.

    Args:
        which: newest, best or step-N.

    Raises:
        CheckpointError: no such whole checkpoint, or what was trained does not fit the base or the format.
        RecipeError: `run` is not the folder of a run.
    """
    recipe = recipe_of(run)
    checkpoint = chosen_checkpoint(run / "checkpoints", which, print, finished_step(run))
    state, tensors = open_state(checkpoint)
    base = resolve_model(recipe.model.path)
    if not is_of(state["base"], base):
        raise CheckpointError(
            f"{checkpoint}: was trained on other base weights than {base} holds now; put those back to export it"
        )
    lora = recipe.lora
    adapter, replaced = split_trained(
        tensors,
        alpha=lora.alpha if lora else 0.0,
        dropout=lora.dropout if lora else 0.0,
        rslora=lora is not None and lora.use_rslora,
    )
    print(f"exporting {checkpoint} on {base} as {kind} to {to}", flush=True)
    if kind == "adapter":
        written = export_adapter(base, to, adapter=adapter, replaced=replaced, base_name=recipe.model.path)
        print(f"{to}: {written.sentence()}")
    else:
        from_base = recipe.model.init == "pretrained"
        merged = export_merged(base, to, adapter=adapter, replaced=replaced, from_base=from_base)
        print(f"{to}: {merged.sentence()}")
    return 0


def print_summary(run: Path, model: Path | None = None) -> int:
    """Print held-out loss before and after, the load of every layer's experts, and where everything lies.

    Args:
        model: a merged export of the run, small enough for this machine's memory: what it and the base write for two
            held-out rows is printed too.

    Raises:
        RecipeError: `run` is not the folder of a run.
        CheckpointError: `model` holds no model.
    """
    recipe = recipe_of(run)
    completions: list[str] = []
    if model is not None:
        if not (model / "config.json").is_file():
            raise CheckpointError(f"{model}: no merged export here (no config.json); name the folder of one")
        from finetune.completions import completion_lines

        completions = completion_lines(recipe, model)
    records = read_metrics(run / "metrics.jsonl")
    snapshots = sorted((run / "routing").glob("step-*.npz"))
    if snapshots:
        snapshot = read_snapshot(snapshots[-1])
        config, _ = model_config(recipe)  # not `resolve_model`, which would fetch the weights for it
        kinds = {layer: _KINDS[kind] for layer, kind in enumerate(config.layer_types)}
        last = [record for record in records if record["kind"] == "routing" and record["step"] == snapshot.step]
        drift = recorded_drift(last[-1]) if last else []
        print_utilisation(snapshot, routing_measures(snapshot), drift, kinds)
    for line in _held_out_lines(records):
        print(line)
    findings = [record for record in records if record["kind"] == "finding" and record["level"] != "info"]
    print(f"findings of the routing and loss rules: {len(findings)}" + "".join(f"\n  {f['message']}" for f in findings))
    print(*completions, "Where things are:", *_places(run), sep="\n")
    return 0


def _held_out_lines(records: list[dict[str, Any]]) -> list[str]:
    evaluations = [record for record in records if record["kind"] == "eval"]
    if len(evaluations) < 2:
        return []
    before, after = evaluations[0], evaluations[-1]
    if before["loss"] is None or after["loss"] is None:
        return [f"held-out loss: not a number at step {(before if before['loss'] is None else after)['step']}"]
    line = f"held-out loss: {before['loss']:.4f} before, {after['loss']:.4f} after {after['step']} steps"
    better = any(record["loss"] is not None and record["loss"] < before["loss"] for record in evaluations[1:])
    worse = [NEVER_BETTER] if before["step"] == 0 and not better else []
    change = paired_change(before["parts"], after["parts"])
    if change is None:
        return [f"{line} (no standard error: it needs two or more batches that are the same in both)", *worse]
    mean, error = change
    line += f"; change {mean:+.4f} with standard error {error:.4f} over {len(after['parts'])} batches"
    return [line + (f" ({abs(mean) / error:.0f} standard errors)" if error else ""), *worse]


def _places(run: Path) -> list[str]:
    """What lies where, and how it is opened; what does not exist is left out. Not wrapped, so paths can be copied."""
    offline = any(run.glob("wandb/offline-run-*"))
    to_see_it = f"offline; see it with: wandb sync {run}/wandb/offline-run-*" if offline else "online"
    rows = (
        ("run folder", run, "recipe.yaml, metrics.jsonl, checkpoints/"),
        ("report data", run / "metrics.jsonl", "one JSON object a line"),
        ("expert counts", run / "routing", "rows per layer and expert of every window (step-*.npz); heatmap.png"),
        ("W&B run", run / "wandb", to_see_it),
        ("merged model", run / "merged", "open with: transformers.AutoModelForCausalLM.from_pretrained(PATH)"),
    )
    return [f"  {name:14} {path}\n  {'':14} {note}" for name, path, note in rows if path.exists()]


_KINDS = {"linear_attention": "DeltaNet", "full_attention": "attention"}
