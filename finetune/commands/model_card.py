"""The model card of an export: what was trained, on what data, and the result. File names are given without folders."""

import datetime
import json
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load

from finetune.recipe.paths import CHECKOUT, is_hub_id
from finetune.recipe.yaml_tree import write
from finetune.training.evaluation import held_out_sentences
from monitoring.files import MonitoringError
from monitoring.metrics import read_metrics

_LIBRARIES = ("torch", "transformers", "peft", "safetensors")
_LICENCE_FILES = ("LICENSE", "LICENCE")


class Exported(NamedTuple):
    """The export that a card describes, and its origin."""

    kind: str  # merged or adapter
    run: Path
    base_name: str  # a hub id, or an absolute path
    base: Path
    state: Mapping[str, Any]  # of the checkpoint
    recipe: Mapping[str, Any]  # its sections


_OPTIMIZERS = {
    "adamw": "AdamW",
    "adam": "Adam",
    "sgd": "SGD",
    "adamw_8bit": "AdamW in 8 bits",
    "adafactor": "Adafactor",
}


def model_card(exported: Exported) -> str:
    """The text of the export's README.md."""
    base = _shown(exported.base_name)
    of_base = " Its card is `README.base.md`." if (exported.base / "README.md").exists() else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(exported, base))
    recipe = {name: exported.recipe[name] for name in ("train", "optim", "lora", "router")}
    if recipe["lora"] and recipe["lora"].get("init_from"):
        recipe["lora"] = {**recipe["lora"], "init_from": Path(recipe["lora"]["init_from"]).name}
    return f"""{_front_matter(exported)}
# {exported.recipe["name"]}

{_what(exported, base)}{of_base} This card was written by Nextune from the records of the run.

| | |
|---|---|
{rows}

## How to load it

```python
{_loading(exported)}
```

## Recipe

```yaml
{write(recipe).strip()}
```
"""


def versions() -> dict[str, str]:
    """The versions of Nextune and of the libraries that write an export."""
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        ours = tomllib.load(file)["project"]["version"]
    return {"nextune": ours, **{name: metadata.version(name) for name in _LIBRARIES}}


def _what(exported: Exported, base: str) -> str:
    step = f"{exported.state['step']:,} step{'s' if exported.state['step'] > 1 else ''}"
    if exported.recipe["model"]["init"] == "random":
        return f"A model trained from random weights for {step}, with the configuration and the tokenizer of {base}."
    how = "with low-rank adapters" if exported.recipe["lora"] else "in all of its parameters"
    form = "The adapters are merged into the weights." if exported.kind == "merged" and exported.recipe["lora"] else ""
    return f"{base}, fine-tuned {how} for {step}. {form}".strip()


def _front_matter(exported: Exported) -> str:
    adapter, random = exported.kind == "adapter", exported.recipe["model"]["init"] == "random"
    values: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if is_hub_id(exported.base_name) and not random:
        values["base_model"] = exported.base_name
        values["base_model_relation"] = "adapter" if adapter else "finetune"
    stated = _card_of(exported.base) if not random else {}
    values |= {name: stated[name] for name in ("license", "license_name", "license_link") if name in stated}
    values["tags"] = ["nextune", *(["lora"] if exported.recipe["lora"] else [])]
    return "\n".join(("---", *(f"{name}: {json.dumps(value, default=str)}" for name, value in values.items()), "---"))


def _rows(exported: Exported, base: str) -> list[tuple[str, str]]:
    recipe, state = exported.recipe, exported.state
    train, optim, lora = recipe["train"], recipe["optim"], recipe["lora"]
    adapted = (
        f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, on {', '.join(lora['targets'])}"
        if lora
        else "every parameter"
    )
    routers = "; routers too" if lora and recipe["router"]["train"] else ""
    losses = _losses(exported.run, state["step"])
    return [
        ("base", f"{base} (fingerprint {state['base'][:14]})"),
        ("licence of the base", _licence(exported.base)),
        ("trained", adapted + routers),
        ("checkpoint", f"step {state['step']:,} of run {recipe['name']}"),
        ("training data", _data(recipe, state, "train") + _passes(state)),
        ("held-out data", _data(recipe, state, "eval")),
        (
            "one step",
            f"{train['global_batch_tokens']:,} tokens in sequences of {train['sequence_tokens']:,}, padding included",
        ),
        (
            "optimizer",
            f"{_OPTIMIZERS[optim.get('name', 'adamw')]}, learning rate {optim['lr']:g} at its peak,"
            f" {optim['schedule']}; see the recipe",
        ),
        *losses,
        ("written with", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("date", datetime.datetime.now(datetime.UTC).date().isoformat()),
    ]


def _data(recipe: Mapping[str, Any], state: Mapping[str, Any], part: str) -> str:
    names = ", ".join(f"`{Path(source['path']).name}`" for source in recipe["data"][part])
    if not names:
        return "none"
    amount = state.get("data", {}).get(part)
    if amount is None:
        return names
    share = amount["supervised_tokens"] / amount["tokens"]
    return f"{names}: {amount['rows']:,} rows, {amount['tokens']:,} tokens, {share:.1%} of them supervised"


def _passes(state: Mapping[str, Any]) -> str:
    packs = state.get("data", {}).get("train", {}).get("packs")
    if not packs:
        return ""
    return f"; seen {state['loader']['epoch'] + state['loader']['cursor'] / packs:.2f} times"


def _losses(run: Path, step: int) -> list[tuple[str, str]]:
    try:
        records = [record for record in read_metrics(run / "metrics.jsonl") if record.get("step", 0) <= step]
    except MonitoringError:
        return [("losses", "not known: the run folder holds no metrics.jsonl that can be read")]
    rows = []
    trained = [record for record in records if record["kind"] == "train" and record["loss"] is not None]
    if trained:
        rows.append(("training loss, nats per token", f"{trained[-1]['loss']:.4f} at step {trained[-1]['step']:,}"))
    if sentences := held_out_sentences(records):
        said = "; ".join(sentences).removeprefix("held-out loss: ")
        rows.append(("held-out loss, nats per token", said))
    return rows


def _licence(base: Path) -> str:
    stated = _card_of(base)
    name = stated.get("license_name") or stated.get("license")
    files = [path.name for path in sorted(base.iterdir()) if path.name.upper().startswith(_LICENCE_FILES)]
    said = [str(name)] if name else []
    return " ".join(said + [f"(`{file}`)" for file in files]) or "not stated in its folder"


def _card_of(base: Path) -> dict[str, Any]:
    """Metadata in the base's model card; empty if it cannot be read."""
    if not (base / "README.md").is_file():
        return {}
    try:
        return metadata_load(base / "README.md") or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _shown(name: str) -> str:
    return f"`{name}`" if is_hub_id(name) else f"`{Path(name).name}`"


def _loading(exported: Exported) -> str:
    if exported.kind == "merged":
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH")'
        )
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("BASE", dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, "PATH")'
    )
