"""Damaged adapters that a run is to start from: refused in a sentence that names the folder, or right."""

import json
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.recipe.sections import Lora
from finetune.training.adapter_folder import adapter_values, check_adapter
from finetune.training.lora import inject
from tests.configs import tiny_config
from tests.fuzzing import changed_bytes, changed_file, few_and_many, fuzz, verdict

LORA = Lora(rank=2, alpha=4, targets=("q_proj",))
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "base_model_name_or_path": "base",
}


@few_and_many(30)
def test_adapter(tmp_path: Path, examples: int) -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(tiny_config()))
    inject(model, rank=2, alpha=4, dropout=0.0, targets=LORA.targets, seed=1)
    parameters = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    module = "base_model.model.model.layers.3.self_attn.q_proj"
    shapes = {"A": (2, 32), "B": (128, 2)}
    valid = save({f"{module}.lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()})
    written = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": valid}

    def check(change: tuple[str, bytes]) -> None:
        for name, content in (written | dict([change])).items():
            (tmp_path / name).write_bytes(content)
        checked = verdict(lambda: check_adapter(tmp_path, LORA), tmp_path)
        accepted.append(not isinstance(checked, ValueError))
        found = verdict(lambda: adapter_values(tmp_path, LORA, parameters, range(8)), tmp_path)
        if not isinstance(checked, ValueError) and not isinstance(found, ValueError):
            assert all(
                found[name].shape == shape and found[name].isfinite().all() for name, shape in parameters.items()
            )

    files = st.one_of(
        st.tuples(st.just("adapter_config.json"), changed_file(CONFIG)),
        st.tuples(st.just("adapter_model.safetensors"), changed_bytes(valid)),
    )
    accepted: list[bool] = []
    check(("adapter_config.json", written["adapter_config.json"]))
    assert accepted == [True], "the adapter without damage"
    fuzz(check, files, examples)
