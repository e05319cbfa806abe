"""Export of a run's LoRA factors as an adapter that stock peft loads on transformers' model.

Every file is read back from the disk and compared before the folder is renamed to its final name.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from finetune.checkpoint.copying import check_written, copy_file, hash_on_disk
from finetune.checkpoint.folder import companions, save_tensors, whole_folder
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.mark import About, name_beside, write_about
from finetune.checkpoint.shards import Checkpoint, listed, read_header
from finetune.checkpoint.trained import LoraFactors, Trained
from finetune.model.config import ModelConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# For transformers models of this family, peft converts adapter targets with these names to targets on the routed
# experts and the router (it assumes the module names of transformers 4). The intended modules are left unadapted.
# Source: `_convert_peft_config_moe`, peft 0.21.
REDIRECTED_BY_PEFT = ("gate", "gate_proj", "up_proj", "down_proj")


class Adapter(NamedTuple):
    """The contents of an exported adapter."""

    modules: list[str]  # names of the adapted modules
    factors: int  # number of tensors

    def sentence(self) -> str:
        """One sentence about what was written and compared."""
        return (
            f"adapter on {len(self.modules)} modules; read back from the disk: its {self.factors} tensors equal those"
            " of the checkpoint bit for bit, and peft reads rank, alpha and modules as trained"
        )


def export_adapter(
    base: str | Path,
    to: str | Path,
    *,
    adapter: LoraFactors | None,
    replaced: Mapping[str, Tensor],
    base_name: str,
    about: About | None = None,
) -> Adapter:
    """Write the LoRA factors as a folder that peft loads on transformers' model.

    Factors of the routed experts are stored in peft's format for stacked parameters. Inference engines that store
    experts one by one may not load them; they need the merged export.

    Args:
        base_name: hub repository or folder of the base model, written into `adapter_config.json`.
        about: contents of the model card and the export mark; None: neither is written.

    Raises:
        CheckpointError: the run trained something that an adapter cannot hold or that peft would load into another
            module; a factor does not fit `base`; `to` is not free; or the files do not read back as written.
    """
    base = Path(base)
    if adapter is None or replaced:
        what = f"parameters themselves ({listed(list(replaced))})" if replaced else "nothing by LoRA"
        raise CheckpointError(f"the run trained {what}, which an adapter cannot hold; export with --format merged")
    misplaced = [name for name in adapter.modules if name.rsplit(".", 1)[-1] in REDIRECTED_BY_PEFT]
    if misplaced:
        raise CheckpointError(
            f"peft would load the factors of {listed(misplaced)} on the routed experts instead; export with "
            "--format merged"
        )
    trained = Trained(ModelConfig.from_folder(base), adapter, replaced)
    tensors = _expert_tensors(trained)
    for module, (a, b) in adapter.modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    with whole_folder(to) as folder:
        save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        _write_adapter_config(folder, adapter, trained.adapted_experts, base_name)
        hashes = {name: hash_on_disk(folder / name) for name in (WEIGHTS, CONFIG)}
        _check(folder, tensors, adapter, trained.adapted_experts)
        if about is not None:
            papers = [path for path in companions(base) if path.name.startswith(("LICEN", "NOTICE", "README"))]
            copies = {
                name_beside(path.as_posix()): copy_file(base / path, folder / name_beside(path.as_posix()))
                for path in papers
            }
            check_written(folder, copies)
            write_about(folder, about, hashes | copies, {})
    return Adapter(
        sorted({*adapter.modules, *(name.rpartition(".")[0] for name in trained.adapted_experts)}), len(tensors)
    )


def _check(folder: Path, tensors: Mapping[str, Tensor], adapter: LoraFactors, experts: Collection[str]) -> None:
    """Compare the tensors on the disk with `tensors`, and the settings as peft loads them with those of the run."""
    read = Checkpoint(folder, read_header(folder / WEIGHTS))
    wrong = sorted(read.tensors.keys() ^ tensors.keys()) or [
        name for name, tensor in tensors.items() if not _same(read.read(name), tensor)
    ]
    config = LoraConfig.from_pretrained(str(folder))
    targets = {*(config.target_modules or ()), *(config.target_parameters or ())}
    read_settings = (config.r, config.lora_alpha, config.use_rslora)
    if targets != {*adapter.modules, *experts} or read_settings != (adapter.rank, adapter.alpha, adapter.rslora):
        wrong.append(CONFIG)
    if wrong:
        raise CheckpointError(f"{listed(wrong)}: not read back as written; check the disk, then export again")


def _same(found: Tensor, written: Tensor) -> bool:
    return found.dtype == written.dtype and found.shape == written.shape and torch.equal(found, written)


def _expert_tensors(trained: Trained) -> dict[str, Tensor]:
    """Factors of the routed experts in peft's format for stacked parameters.

    `lora_A` concatenates A of all experts along the rows; in `lora_B` the expert is the innermost dimension. Each
    parameter has its own wrapper: the outer one adapts `down_proj`, its `base_layer` adapts `gate_up_proj`.

    Source: `ParamWrapper`, peft 0.21.
    """
    tensors = {}
    for parameter in sorted(trained.adapted_experts):
        module, _, matrix = parameter.rpartition(".")
        wrapper = f"base_model.model.{module}" + (".base_layer" if matrix == "gate_up_proj" else "")
        pairs = [trained.expert_factors(parameter, expert) for expert in range(trained.shapes[parameter][0])]
        tensors[f"{wrapper}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        tensors[f"{wrapper}.lora_B.weight"] = torch.stack([b for _, b in pairs], dim=-1).flatten(1)
    return tensors


def _write_adapter_config(folder: Path, adapter: LoraFactors, parameters: Collection[str], base_name: str) -> None:
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        # Full names: a suffix such as `out_proj` would also adapt modules that this run did not train.
        target_modules=list(adapter.modules),
        target_parameters=sorted(parameters) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    path = folder / CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(values["target_modules"])  # peft stores a set, in arbitrary order
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
