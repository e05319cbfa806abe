"""The plan against what it predicts: transformers and peft for counts, torch for saved bytes and operations, the engine
for the state of every rank."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from data.packing import Batch
from finetune.distributed import world as worlds
from finetune.distributed.expert_exchange import attach
from finetune.engine import engine as engines
from finetune.engine.optimizer import MOMENTS
from finetune.kernels.choose import CPU_MIXERS, Kernels, Layers, Mixers, install
from finetune.kernels.torch.experts import experts_grouped
from finetune.kernels.triton import attention as attention_kernel
from finetune.kernels.triton import (
    delta_rule,
    deltanet,
    fused_experts,
    gated_norm,
    loss,
    norm,
    residual_norm,
    router,
    swiglu,
)
from finetune.model.config import ALL, NOTHING, ModelConfig, Recompute
from finetune.model.delta_rule import chunked_gated_delta_rule
from finetune.model.head import token_loss_sum
from finetune.model.model import PADDING, HybridMoEForCausalLM
from finetune.model.moe import Experts, MoE
from finetune.plan import planner
from finetune.plan import state_memory as state_bytes
from finetune.plan.activations import (
    DELTA_CHUNK_TOKENS,
    LOSS_CHUNK_BYTES,
    LOSS_CHUNK_TOKENS,
    Setting,
    attention_output,
    experts_tensors,
    kept_between_layers,
    mixer_tensors,
)
from finetune.plan.adapter_targets import adapter_parameters
from finetune.plan.operations import recompute_operations, step_operations
from finetune.plan.planner import Plan, model_config, plan
from finetune.plan.report import render
from finetune.plan.workload import GIB, Machine
from finetune.recipe.load import load_recipe
from finetune.recipe.paths import CHECKOUT
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.recipe.sections import MIXER_TARGETS
from finetune.training.lora import inject
from finetune.training.step import optimize
from tests.configs import CONFIGS, randomise, tiny_config
from tests.ranks import ranks

REFERENCE = json.loads(planner.REFERENCE.read_text(encoding="utf-8"))
H100 = Machine(ranks=8, ranks_per_node=8, device_name="NVIDIA H100 80GB HBM3", device_bytes=int(79.6 * GIB))
CPU = Machine(ranks=2, ranks_per_node=2, device_name="CPU", device_bytes=None, host_bytes=8 * GIB)


def recipe_of(**sections: Any) -> Recipe:
    """A recipe with small batches; `sections` replace or add to it."""
    values: dict[str, Any] = {
        "name": "x",
        "model": {"path": "x", "dtype": "float32"},
        "data": {"train": ({"path": "x"},)},
        "train": {"steps": 5, "sequence_tokens": 32, "micro_batch_tokens": 64, "global_batch_tokens": 256},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate(values)


FULL_RECOMPUTE = "train.recompute=full"


def code(*overrides: str) -> Recipe:
    return load_recipe(CHECKOUT / "recipes" / "code.yaml", overrides)


# Counts


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(Qwen3NextConfig(**CONFIGS[name]))
    ours = ModelConfig.from_dict(CONFIGS[name]).parameter_counts()
    assert sum(ours.values()) == sum(p.numel() for p in theirs.parameters())
    assert ours["experts"] == sum(p.numel() for n, p in theirs.named_parameters() if ".mlp.experts." in n)


def test_the_reference_is_the_released_model() -> None:
    counts = ModelConfig.from_dict(REFERENCE).parameter_counts()
    assert sum(counts.values()) == 79_674_391_296
    assert counts["experts"] == 77_309_411_328
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(Qwen3NextConfig(**REFERENCE))
    assert sum(p.numel() for p in theirs.parameters()) == 79_674_391_296


@pytest.mark.parametrize("name", [*CONFIGS, "reference"])
def test_mixer_adapters_are_those_of_peft_on_transformers(name: str) -> None:
    values = REFERENCE if name == "reference" else CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**values))
        model = inject_adapter_in_model(LoraConfig(r=3, target_modules=list(MIXER_TARGETS)), model)
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert adapter_parameters(ModelConfig.from_dict(values), recipe_of(lora={"rank": 3})) == (adapters, 0)


@pytest.mark.parametrize("target", [*MIXER_TARGETS, "shared_expert", "experts"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_target_is_what_training_adapts(name: str, target: str) -> None:
    config = ModelConfig.from_dict(CONFIGS[name])
    with torch.device("meta"):
        model = HybridMoEForCausalLM(config)
        inject(model, rank=5, alpha=1, dropout=0, targets=(target,), seed=0)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = (0, adapters) if target == "experts" else (adapters, 0)
    assert adapter_parameters(config, recipe_of(lora={"rank": 5, "targets": (target,)})) == expected != (0, 0)


def test_adapters_on_the_experts_of_the_released_model() -> None:
    """Counted by hand: 48 layers of 512 experts, on each 2048 -> 2 x 512 and 512 -> 2048."""
    overrides = "lora.targets=[q_proj, experts]", "lora.rank=16"
    config = ModelConfig.from_dict(REFERENCE)
    assert adapter_parameters(config, code(*overrides))[1] == 48 * 512 * 16 * (2048 + 1024 + 512 + 2048)
    expert_16 = *overrides, "parallel.expert=16", "parallel.ranks=16", "train.global_batch_tokens=1048576"
    made = plan(config, code(*expert_16), replace(H100, ranks=16))
    assert made.work.trained_experts // 16 == 138_412_032
    assert made.memory["adapters"] == 2 * (made.work.dense_adapters + 138_412_032)
    assert made.work.active_adapters == made.work.dense_adapters + 48 * 10 * 16 * (2048 + 1024 + 512 + 2048)


def test_a_target_that_no_layer_has_is_refused() -> None:
    config = ModelConfig.from_dict(tiny_config(num_hidden_layers=1, layer_types=["full_attention"]))
    with pytest.raises(RecipeError, match=r"^x: lora\.targets: no layer of this model has in_proj_ba; leave it out$"):
        plan(config, recipe_of(lora={"targets": ("q_proj", "in_proj_ba")}), replace(CPU, ranks=1))


# State of every rank, against DeepSpeed


STATES = {
    "adapters-and-router-expert-2": recipe_of(
        lora={"rank": 4}, router={"train": True}, parallel={"ranks": 2, "expert": 2}
    ),
    "adapters-zero-1": recipe_of(lora={"rank": 4}, parallel={"ranks": 2, "zero_stage": 1}),
    "expert-adapters-expert-2": recipe_of(
        lora={"rank": 3, "targets": ("o_proj", "experts")}, parallel={"ranks": 2, "expert": 2}
    ),
    "everything-expert-2": recipe_of(lora=None, router={"train": True}, parallel={"ranks": 2, "expert": 2}),
    "all-but-routers": recipe_of(lora=None, parallel={"ranks": 2}),
    "adapters-zero-0": recipe_of(lora={"rank": 4}, parallel={"ranks": 2, "zero_stage": 0}),
    "everything-zero-0-bfloat16": recipe_of(
        model={"path": "m", "dtype": "bfloat16"},
        lora=None,
        router={"train": True},
        parallel={"ranks": 2, "expert": 2, "zero_stage": 0},
    ),
    "everything-bfloat16": recipe_of(
        model={"path": "m", "dtype": "bfloat16"}, lora=None, router={"train": True}, parallel={"ranks": 2, "expert": 2}
    ),
}


def measure_states(rank: int) -> dict[str, dict[str, int]]:
    return {name: measure_state(recipe) for name, recipe in STATES.items()}


def measure_state(recipe: Recipe) -> dict[str, int]:
    """Bytes that one rank holds after a step of this recipe on the tiny model."""
    world = worlds.start(recipe.parallel.expert)
    config = ModelConfig.from_dict(tiny_config())
    model = HybridMoEForCausalLM(config, world.experts(config.num_experts))
    randomise(model, 0)
    if recipe.lora is not None:
        lora = recipe.lora
        inject(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(recipe.router.train)
    model.cast(torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32)
    if world.expert_group is not None:
        attach(model, world.expert_group)
    engine = engines.start(model, recipe, world, accumulation=1)
    ids = torch.randint(0, config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(world.rank))
    optimize(engine, [Batch(ids, ids, torch.zeros_like(ids))], recipe.router, world)
    states = engine.optimizer.optimizer.state
    own = {id(parameter) for parameter in model.parameters()}  # a master that is the parameter itself is no copy
    stored = engines.training_state(engine, world)
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "float32 copies": sum(master.numel() for master in states if id(master) not in own) * 4,
        "moments": sum(state[kind].numel() for state in states.values() for kind in MOMENTS) * 4,
        "stored": sum(tensor.numel() for tensor in stored.values()) * 4,
        "groups": len(engine.optimizer.param_groups),
    }


def test_state_of_every_rank_is_what_deepspeed_holds() -> None:
    measured = ranks(2, measure_states)
    config = ModelConfig.from_dict(tiny_config())
    for name, recipe in STATES.items():
        made = plan(config, recipe, CPU)
        weights = sum(made.memory[part] for part in ("weights, all but experts", "weights, experts", "adapters"))
        for rank in range(2):
            held = measured[rank][name]
            assert held["weights"] == weights, name
            # Partitions are padded to whole ranks, group by group.
            slack = 4 * 8 * held["groups"]
            assert 0 <= held["float32 copies"] - made.memory["float32 copies of what trains"] <= slack, name
            assert 0 <= held["moments"] - made.memory["AdamW moments"] <= 2 * slack, name
        assert sum(measured[rank][name]["stored"] for rank in range(2)) == made.checkpoint_bytes, name


# Activations, against what torch saves


FUSED = Kernels(
    experts=fused_experts.experts_fused,
    whole=fused_experts.moe_fused,
    layers=Layers(
        norm.rms_norm_fused,
        residual_norm.residual_norm_fused,
        router.route_fused,
        swiglu.swiglu_fused,
        swiglu.add_gated_fused,
        loss.token_loss_sum_fused,
    ),
    mixers=Mixers(
        prepare_delta=deltanet.prepare_fused,
        rule=delta_rule.gated_delta_rule,
        gated_norm=gated_norm.gated_norm_fused,
        prepare_attention=attention_kernel.prepare_fused,
        gate_output=attention_kernel.gate_output_fused,
    ),
)


def planned_bytes(config: ModelConfig, setting: Setting) -> float:
    """Of the only layer: both halves, and where it has attention, what that gives."""
    attended = attention_output(config, setting) if config.layer_types[0] == "full_attention" else 0
    return sum(mixer_tensors(config, 0, setting)) + sum(experts_tensors(config, 0, setting)) + attended


def saved_bytes(
    config: ModelConfig, setting: Setting, tokens: int, *, rank: int = 4, again: Recompute = NOTHING, padding: int = 0
) -> int:
    """Bytes of distinct storages, parameters and input aside, that the first layer keeps for its backward pass."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[setting.weight_bytes]
    model = HybridMoEForCausalLM(config)
    randomise(model, 0)
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = experts_grouped
    if setting.fused_layers:
        install(model, FUSED)
    if setting.cpu_mixers:
        install(model, Kernels(experts=experts_grouped, mixers=CPU_MIXERS))
    model.recompute = (again,)
    if setting.exchanged:
        attach(model, dist.group.WORLD)
        for module in model.modules():
            if isinstance(module, MoE):
                module.whole = None
    if not setting.full_parameter:
        targets: list[str] = [
            t for t in MIXER_TARGETS if ("_proj_" in t or t == "out_proj") == model.model.layers[0].is_linear
        ]
        targets += ["experts"] if setting.expert_adapter_rank else []
        inject(model, rank=rank, alpha=4, dropout=0.5 if setting.dropped else 0, targets=targets, seed=0)
    x = torch.randn(1, tokens, config.hidden_size).to(dtype).requires_grad_()
    segments = (torch.arange(tokens) // (tokens // 2 if setting.masked else tokens)).unsqueeze(0)
    segments[0, tokens - padding :] = PADDING
    layout = model._layout(x, segments, None, None)[0]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    if setting.fused_layers or again.mixer:
        parameters.add(x.untyped_storage().data_ptr())  # what the layer before has left: counted there
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, so that no other tensor takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.layers[0](x, layout)
    return sum(storage.nbytes() for storage in saved.values())


WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 48,
    "linear_value_head_dim": 80,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 160,
    "intermediate_size": 300,
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("dense", [False, True], ids=["experts", "dense"])
@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
@pytest.mark.parametrize("weight_bytes", [2, 4])
@pytest.mark.parametrize(
    ("mixer", "cpu"), [("linear_attention", False), ("linear_attention", True), ("full_attention", False)]
)
def test_saved_tensors_of_a_layer(
    mixer: str, cpu: bool, weight_bytes: int, full: bool, dense: bool, packed: bool
) -> None:
    config = ModelConfig.from_dict(
        tiny_config(**WIDE, layer_types=[mixer], mlp_only_layers=[0] if dense else [])  # type: ignore[arg-type]
    )
    setting = Setting(
        weight_bytes=weight_bytes,
        full_parameter=full,
        sequence_tokens=256,
        masked=packed,
        cpu_mixers=cpu,
    )
    planned = 256 * planned_bytes(config, setting)
    # Never much too little; in float32 some conversions are free, which the plan does not count on.
    assert 0.97 <= planned / saved_bytes(config, setting, 256) <= (1.03 if weight_bytes == 2 else 1.2)


@pytest.mark.parametrize("weight_bytes", [2, 4])
def test_saved_tensors_of_adapted_experts(weight_bytes: int) -> None:
    config = ModelConfig.from_dict(tiny_config(**WIDE, layer_types=["linear_attention"]))  # type: ignore[arg-type]
    setting = Setting(
        weight_bytes=weight_bytes, full_parameter=False, sequence_tokens=256, masked=False, expert_adapter_rank=8
    )
    frozen = replace(setting, expert_adapter_rank=0)
    planned, before = (256 * planned_bytes(config, kind) for kind in (setting, frozen))
    found, without = (saved_bytes(config, kind, 256, rank=8) for kind in (setting, frozen))
    assert planned - before == found - without > 0


FUSABLE = {**WIDE, "linear_key_head_dim": 32, "linear_value_head_dim": 64}  # head dims that the kernels take


@pytest.mark.parametrize(
    ("mixer", "trains"),
    [
        ("linear_attention", "adapters"),
        pytest.param("full_attention", "adapted-experts", marks=pytest.mark.slow),
        ("full_attention", "full"),
        pytest.param("linear_attention", "full", marks=pytest.mark.slow),
        pytest.param("linear_attention", "adapted-experts", marks=pytest.mark.slow),
        pytest.param("full_attention", "adapters", marks=pytest.mark.slow),
    ],
)
def test_saved_tensors_of_fused_kernels_and_of_each_half(mixer: str, trains: str) -> None:
    config = ModelConfig.from_dict(tiny_config(**FUSABLE, layer_types=[mixer]))  # type: ignore[arg-type]
    setting = Setting(
        weight_bytes=4,
        full_parameter=trains == "full",
        sequence_tokens=64,
        masked=False,
        expert_adapter_rank=8 if trains == "adapted-experts" else 0,
        fused_experts=True,
        fused_layers=True,
        fused_mixers=True,
    )
    mixer_half, experts_half = (64 * sum(part(config, 0, setting)) for part in (mixer_tensors, experts_tensors))
    rank = setting.expert_adapter_rank or 4
    mixer_half += 64 * 4 * config.hidden_size  # the input of the other half, which is computed again
    mixer_half += 64 * attention_output(config, setting) if mixer == "full_attention" else 0
    # Left out are the adapters' thin products and what the tiles of the experts are cut into.
    assert 0.93 <= mixer_half / saved_bytes(config, setting, 64, rank=rank, again=Recompute(False, True)) <= 1.03
    assert 0.93 <= experts_half / saved_bytes(config, setting, 64, rank=rank, again=Recompute(True, False)) <= 1.03
    assert saved_bytes(config, setting, 64, rank=rank, again=ALL) == 0


@pytest.mark.parametrize("fused", [True, False])
def test_saved_tensors_of_experts_whose_rows_travel(fused: bool) -> None:
    config = ModelConfig.from_dict(tiny_config(**FUSABLE, layer_types=["full_attention"]))  # type: ignore[arg-type]
    setting = Setting(
        weight_bytes=4,
        full_parameter=False,
        sequence_tokens=64,
        masked=False,
        exchanged=True,
        **dict.fromkeys(("fused_experts", "fused_layers", "fused_mixers"), fused),
    )
    planned = 64 * sum(experts_tensors(config, 0, setting))
    (found,) = ranks(1, saved_on_rank, config, setting)
    assert 0.95 <= planned / found <= 1.03


def saved_on_rank(_: int, config: ModelConfig, setting: Setting) -> int:
    return saved_bytes(config, setting, 64, again=Recompute(True, False))


@pytest.mark.parametrize("mixer", ["linear_attention", "full_attention"])
def test_saved_tensors_of_adapters_with_dropout(mixer: str) -> None:
    config = ModelConfig.from_dict(tiny_config(**WIDE, layer_types=[mixer]))  # type: ignore[arg-type]
    without = Setting(weight_bytes=4, full_parameter=False, sequence_tokens=256, masked=False)
    dropped = replace(without, dropped=MIXER_TARGETS)
    planned = 256 * (planned_bytes(config, dropped) - planned_bytes(config, without))
    found = saved_bytes(config, dropped, 256) - saved_bytes(config, without, 256)
    # The inputs as they were are kept for nobody then, which the plan does not count on.
    assert 0.95 <= planned / found <= 1.6


def test_padding_makes_a_layer_keep_no_more() -> None:
    config = ModelConfig.from_dict(tiny_config(**FUSABLE, layer_types=["full_attention"]))  # type: ignore[arg-type]
    setting = Setting(
        weight_bytes=4,
        full_parameter=False,
        sequence_tokens=64,
        masked=False,
        **dict.fromkeys(("fused_experts", "fused_layers", "fused_mixers"), True),
    )
    without, padded = (saved_bytes(config, setting, 64, padding=padding) for padding in (0, 8))
    assert padded <= 1.01 * without


def test_what_a_layer_leaves_is_its_output_and_its_routing() -> None:
    config = ModelConfig.from_dict(tiny_config(**WIDE))  # type: ignore[arg-type]
    model = HybridMoEForCausalLM(config)
    randomise(model, 0)
    x = torch.randn(1, 64, config.hidden_size)
    out, routing = model.model.layers[0](x, model._layout(x, torch.zeros(1, 64, dtype=torch.long), None, None)[0])
    setting = Setting(weight_bytes=4, full_parameter=False, sequence_tokens=64, masked=False)
    left = sum(t.numel() * t.itemsize for t in (out, routing.experts, routing.weights))
    assert 64 * kept_between_layers(config, 0, setting) == left
    assert 64 * kept_between_layers(config, 0, replace(setting, router_losses=True)) == left + 2 * routing.logits.nbytes


def test_chunks_are_those_of_the_model() -> None:
    assert inspect.signature(chunked_gated_delta_rule).parameters["chunk_tokens"].default == DELTA_CHUNK_TOKENS
    assert inspect.signature(token_loss_sum).parameters["chunk_tokens"].default == LOSS_CHUNK_TOKENS
    assert delta_rule.CHUNK == DELTA_CHUNK_TOKENS
    assert loss.CHUNK_BYTES == LOSS_CHUNK_BYTES
    config = engines.deepspeed_config(recipe_of(), accumulation=1, dtype=torch.float32)
    assert config["zero_optimization"]["reduce_bucket_size"] == state_bytes.REDUCE_BUCKET


# Operations, against torch's counter


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_operations_are_those_that_torch_counts(full: bool) -> None:
    config = ModelConfig.from_dict(tiny_config(**{**WIDE, "num_hidden_layers": 4, "vocab_size": 500}))  # type: ignore[arg-type]
    model = HybridMoEForCausalLM(config)
    randomise(model, 0)
    adapters = 0
    if not full:
        inject(model, rank=4, alpha=4, dropout=0, targets=MIXER_TARGETS, seed=0)
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.model.embed_tokens.requires_grad_()  # so that gradients flow to the first layer, as the plan counts
    ids = torch.randint(0, 500, (1, 128), generator=torch.Generator().manual_seed(0))
    planned = 128 * step_operations(config, 128, adapter_parameters=adapters, full_parameter=full, router_trains=full)
    counted = count_operations(model, ids)
    # Beside the matrices: the head is computed once more by the chunked loss, a triangular solve is not counted by
    # torch, and neither is torch's attention on a CPU.
    head = 2 * 128 * config.vocab_size * config.hidden_size
    assert planned == pytest.approx(counted - head, rel=0.08)

    for choice in (ALL, Recompute(True, False), Recompute(False, True)):
        layers = [choice] * config.num_hidden_layers
        model.recompute = layers
        again = 128 * recompute_operations(config, 128, adapter_parameters=adapters, layers=layers)
        assert again == pytest.approx(count_operations(model, ids) - counted, rel=0.08), choice


def in_place_flops(_: Any, a: tuple[int, ...], b: tuple[int, ...], **unused: Any) -> int:
    """Of `addmm_`, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def count_operations(model: HybridMoEForCausalLM, ids: torch.Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops}) as counter:
        loss = model(ids, labels=ids).loss_sum
        assert loss is not None
        loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("sequence_tokens", "operations", "recomputed"),
    [(4096, 16.33e9, 6.73e9), (16384, 20.56e9, 6.73e9), (65536, 37.47e9, 6.73e9)],
)
def test_operations_of_the_released_model(sequence_tokens: int, operations: float, recomputed: float) -> None:
    """Against the figures worked out by hand for rank-16 adapters on the mixers."""
    config = ModelConfig.from_dict(REFERENCE)
    adapters = 16 * 1_071_360
    step = step_operations(
        config, sequence_tokens, adapter_parameters=adapters, full_parameter=False, router_trains=False
    )
    assert step == pytest.approx(operations, rel=1e-3)
    layers = [ALL] * config.num_hidden_layers
    found = recompute_operations(config, sequence_tokens, adapter_parameters=adapters, layers=layers)
    assert found == pytest.approx(recomputed, rel=1e-3)


# The plan as a whole


def test_the_real_job_fits_its_machine_and_says_where_its_sizes_come_from() -> None:
    config, source = model_config(code())
    assert "sizes from the reference config; the checkpoint's own config.json decides at load" in source
    made = plan(config, code(), H100)
    assert made.fits
    weights = made.memory["weights, all but experts"] + made.memory["weights, experts"]
    assert weights / 1e9 == pytest.approx(24.1, abs=0.1)  # bfloat16, experts over 8 ranks
    text = render(made, source)
    assert source in text
    assert "79,674,391,296 parameters, of which 17,141,760 train" in text
    assert "Fits: " in text
    assert "1,000 steps, 524,288,000 tokens" in text


@pytest.mark.parametrize(
    ("overrides", "machine"),
    [
        (("parallel.expert=1",), H100),
        (("train.recompute=none",), H100),
        (("train.recompute=none", "parallel.expert=2"), H100),
        (("train.micro_batch_tokens=65536",), replace(H100, device_bytes=64 * GIB)),
        (("parallel.zero_stage=1", "parallel.expert=1"), replace(H100, device_bytes=141 * GIB)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_following_the_advice_makes_it_fit(overrides: tuple[str, ...], machine: Machine) -> None:
    config = ModelConfig.from_dict(REFERENCE)
    made = plan(config, code(*overrides), machine)
    assert made.fits is False
    assert made.suggestion is not None
    advised = re.findall(r"([a-z_]+\.[a-z_]+): (\w+)", made.suggestion)
    assert made.suggestion.startswith("set ")
    changed = {key: value for key, _, value in (override.partition("=") for override in overrides)} | dict(advised)
    assert plan(config, code(*(f"{key}={value}" for key, value in changed.items())), machine).fits
    text = render(made)
    assert "Does NOT fit: " in text
    assert f"To make it fit: {made.suggestion}." in text


def test_too_few_gpus_are_told_how_many_it_takes() -> None:
    config = ModelConfig.from_dict(REFERENCE)
    made = plan(config, code("parallel.ranks=2", "parallel.expert=2"), replace(H100, ranks=2))
    assert made.suggestion == "use 4 such GPUs and set parallel.expert: 4"
    enough = plan(config, code("parallel.ranks=4", "parallel.expert=4"), replace(H100, ranks=4))
    assert enough.fits


def test_a_gpu_that_no_setting_fits_is_told_so() -> None:
    made = plan(ModelConfig.from_dict(REFERENCE), code(), replace(H100, device_bytes=2 * GIB))
    assert made.suggestion == "use more memory a rank: no setting of this recipe makes it fit"


@pytest.mark.parametrize(
    ("tokens", "packing", "measured_gib"), [(8192, "packed", 5.3), (8192, "padded", 5.2), (16384, "padded", 10.3)]
)
def test_working_memory_is_what_a_gpu_took(tokens: int, packing: str, measured_gib: float) -> None:
    # One step of 4 layers at the real widths, adapters of rank 16, bfloat16, recompute full, on one H200 with torch
    # 2.11: the peak above the weights. Within a tenth, for the allocator's rounding.
    config = ModelConfig.from_dict({**REFERENCE, "num_hidden_layers": 4})
    sizes = f"train.sequence_tokens={tokens}", f"train.micro_batch_tokens={tokens}", f"data.packing={packing}"
    plain = "kernels.experts=grouped", "kernels.layers=plain", "kernels.mixers=plain", "train.recompute=full"
    made = plan(config, code("parallel.expert=1", "parallel.ranks=1", *sizes, *plain), replace(H100, ranks=1))
    apart = ("weights, all but experts", "weights, experts", "runtime")
    working = sum(size for name, size in made.memory.items() if name not in apart)
    assert working == pytest.approx(measured_gib * GIB, rel=0.1)


def test_what_costs_memory_costs_memory() -> None:
    config = ModelConfig.from_dict(REFERENCE)

    def rank_bytes(*overrides: str) -> int:
        again = () if any("recompute" in override for override in overrides) else (FULL_RECOMPUTE,)
        return plan(config, code(*again, *overrides), H100).rank_bytes

    assert rank_bytes("parallel.expert=4") - rank_bytes() == 2 * 77_309_411_328 // 8
    assert rank_bytes("train.recompute=none") > 3 * rank_bytes()
    assert rank_bytes("train.micro_batch_tokens=16384") > rank_bytes()
    assert rank_bytes("model.dtype=float32") > rank_bytes() + 20 * GIB
    full = "lora=null", "monitor.drift_every_steps=0", "monitor.probe_tokens=4096"
    assert rank_bytes(*full) > rank_bytes() + 100 * GIB
    assert rank_bytes(*full, "parallel.zero_stage=1") > rank_bytes(*full)


FULL = "lora=null", "monitor.drift_every_steps=0", "monitor.probe_tokens=4096", FULL_RECOMPUTE


def test_an_offloaded_state_is_counted_where_it_is() -> None:
    """Full-parameter training on 8 GPUs: by hand, 16 bytes a parameter of a rank's share on the host with rounding."""
    config, node = ModelConfig.from_dict(REFERENCE), replace(H100, host_bytes=2048 * GIB)
    here, host = plan(config, code(*FULL), node), plan(config, code(*FULL, "parallel.offload=cpu"), node)
    nvme = plan(config, code(*FULL, "parallel.offload=nvme", "parallel.offload_path=/nvme"), node)
    share = host.work.trained / 8
    assert here.offload_host_bytes == here.offload_disk_bytes == host.offload_disk_bytes == 0
    assert host.offload_host_bytes == pytest.approx(8 * share * (12 + 4 + 2), rel=1e-6)
    assert nvme.offload_host_bytes == pytest.approx(8 * share * (4 + 2), rel=1e-6)
    assert nvme.offload_disk_bytes == pytest.approx(8 * share * 12, rel=1e-6)
    assert here.rank_bytes - host.rank_bytes == pytest.approx(share * 12, rel=0.01)
    assert host.rank_bytes == nvme.rank_bytes
    assert "memory of each node for what is offloaded" in render(host)
    assert "GiB in /nvme" in render(nvme)


def test_a_node_without_room_for_what_is_offloaded_is_told_so() -> None:
    config = ModelConfig.from_dict(REFERENCE)
    wide = replace(H100, device_bytes=192 * GIB, host_bytes=512 * GIB)
    made = plan(config, code(*FULL, "parallel.offload=cpu"), wide)
    assert made.work.room_bytes is not None
    assert made.rank_bytes < made.work.room_bytes
    assert made.fits is False
    assert "but what is offloaded takes 1,3" in render(made)
    assert plan(config, code(*FULL, "parallel.offload=cpu"), replace(wide, host_bytes=2048 * GIB)).fits


def test_offload_is_advised_when_nothing_else_fits() -> None:
    config, wide = ModelConfig.from_dict(REFERENCE), replace(H100, device_bytes=141 * GIB, host_bytes=2048 * GIB)
    made = plan(config, code(*FULL), wide)
    assert made.fits is False
    assert made.suggestion is not None
    assert made.suggestion.endswith("parallel.offload: cpu")


@pytest.mark.parametrize("name", ["tiny", "tiny-base", "code"])
def test_every_recipe_can_be_planned(name: str) -> None:
    recipe = load_recipe(CHECKOUT / "recipes" / f"{name}.yaml")
    config, source = model_config(recipe)
    made = plan(config, recipe, replace(CPU, ranks=recipe.parallel.ranks, ranks_per_node=8))
    assert made.fits is (name != "code")
    assert "time: no estimate" in render(made, source)


def test_counting_ahead_for_the_balance_of_a_step_is_counted() -> None:
    config = ModelConfig.from_dict(tiny_config())
    recompute = {"train": {"recompute": "none"}}
    balanced = {"router": {"train": True, "balance": {"coefficient": 1e-2}}}

    def recomputed(**sections: Any) -> float:
        return plan(config, recipe_of(**{**recompute, **sections}), CPU).recomputed

    assert recomputed() == 0
    assert recomputed(**balanced) > 0
    assert recomputed(**balanced, train={"recompute": "none", "global_batch_tokens": 128}) == 0


def test_a_folder_on_this_machine_decides_over_the_reference(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    config, source = model_config(recipe_of(model={"path": str(tmp_path)}))
    assert config == ModelConfig.from_dict(tiny_config())
    assert source == f"sizes from {tmp_path / 'config.json'}"


def test_a_model_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^x: model\.path: 'someone/else' is not on this machine and its sizes"):
        model_config(recipe_of(model={"path": "someone/else"}))


@pytest.mark.parametrize(
    ("sections", "ranks_", "expected"),
    [
        ({"parallel": {"ranks": 2, "expert": 2}}, 3, "2 does not divide the 3 ranks of this run"),
        ({"parallel": {"ranks": 3, "expert": 3}}, 3, "3 does not divide the 8 experts of the model"),
        ({}, 3, r"256 is not a multiple of train.micro_batch_tokens x 3 ranks \(64 x 3\)"),
    ],
)
def test_what_does_not_divide_is_refused(sections: dict[str, Any], ranks_: int, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        plan(ModelConfig.from_dict(tiny_config()), recipe_of(**sections), replace(CPU, ranks=ranks_))


def test_room_on_a_host_is_shared_by_its_ranks_and_unknown_room_is_said() -> None:
    config = ModelConfig.from_dict(tiny_config())
    two, one = plan(config, recipe_of(), CPU), plan(config, recipe_of(), replace(CPU, ranks=1))
    assert two.work.room_bytes is not None
    assert one.work.room_bytes is not None
    assert abs(2 * two.work.room_bytes - one.work.room_bytes) <= 2
    unknown: Plan = plan(config, recipe_of(), replace(CPU, host_bytes=None))
    assert unknown.fits is None
    assert "Whether it fits is not known" in render(unknown)


def test_a_full_disk_is_told() -> None:
    config = ModelConfig.from_dict(REFERENCE)
    text = render(plan(config, code(), replace(H100, disk_bytes=GIB // 2)))
    assert "only 0.5 GiB are free there: lower checkpoint.keep or set output.dir elsewhere" in text
    assert "are free there" not in render(plan(config, code(), replace(H100, disk_bytes=GIB)))
