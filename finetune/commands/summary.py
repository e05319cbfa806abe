"""The closing summary of a run."""

from pathlib import Path

from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.mark import read_mark
from finetune.plan.planner import model_config
from finetune.run.folder import recipe_of
from finetune.training.evaluation import held_out_sentences
from monitoring.metrics import read_metrics
from monitoring.routing import read_snapshot, recorded_drift, routing_measures
from monitoring.table import print_utilisation

MERGED_BY_LAUNCH = "merged-by-launch"  # in the run folder; launch.sh alone exports there


def print_summary(run: str | Path, model: str | Path | None = None) -> int:
    """Print held-out loss before and after, the expert load of every layer, and the paths of all outputs.

    Args:
        model: a merged export of the run, small enough for this machine's memory; completions of two held-out rows by
            it and by the base are printed too.

    Raises:
        RecipeError: `run` is not a run folder.
        CheckpointError: `model` holds no model.
    """
    run, model = Path(run), Path(model) if model is not None else None
    recipe = recipe_of(run)
    completions: list[str] = []
    if model is not None:
        if not (model / "config.json").is_file():
            raise CheckpointError(f"{model}: no merged export here (no config.json); name the folder of one")
        from finetune.commands.completions import completion_lines

        completions = completion_lines(recipe, model)
    records = read_metrics(run / "metrics.jsonl")
    snapshots = sorted((run / "routing").glob("step-*.npz"))
    if snapshots:
        snapshot = read_snapshot(snapshots[-1])
        config, _ = model_config(recipe)  # `resolve_model` would download the weights for it
        kinds = {layer: _KINDS[kind] for layer, kind in enumerate(config.layer_types)}
        last = [record for record in records if record["kind"] == "routing" and record["step"] == snapshot.step]
        drift = recorded_drift(last[-1]) if last else []
        print_utilisation(snapshot, routing_measures(snapshot), drift, kinds)
    for line in held_out_sentences(records):
        print(line)
    findings = [record for record in records if record["kind"] == "finding" and record["level"] != "info"]
    print(f"findings of the routing and loss rules: {len(findings)}" + "".join(f"\n  {f['message']}" for f in findings))
    print(*completions, "Where things are:", *_places(run), sep="\n")
    return 0


def _places(run: Path) -> list[str]:
    """The existing outputs, and how to open them; lines are not wrapped, so that paths can be copied."""
    offline = any(run.glob("wandb/offline-run-*"))
    to_see_it = f"offline; see it with: wandb sync {run}/wandb/offline-run-*" if offline else "online"
    rows = (
        ("run folder", run, "recipe.yaml, metrics.jsonl, checkpoints/"),
        ("report data", run / "metrics.jsonl", "one JSON object a line"),
        ("expert counts", run / "routing", "rows per layer and expert of every window (step-*.npz); heatmap.png"),
        ("W&B run", run / "wandb", to_see_it),
        *(("merged model", run / name, _merged_note(run / name)) for name in (MERGED_BY_LAUNCH, "merged")),
    )
    return [f"  {name:14} {path}\n  {'':14} {note}" for name, path, note in rows if path.exists()]


def _merged_note(folder: Path) -> str:
    mark = read_mark(folder) or {}
    step = f"of step {mark['step']}; " if "step" in mark else ""
    return f"{step}open with: transformers.AutoModelForCausalLM.from_pretrained(PATH)"


_KINDS = {"linear_attention": "DeltaNet", "full_attention": "attention"}
