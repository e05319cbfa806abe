"""Adapters on the routed experts: the kernel against the definition, the model and both exports against peft on
transformers, and training over expert ranks against plain PyTorch in one process."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3NextForCausalLM

from data.packing import Batch
from finetune.checkpoint.adapter import export_adapter
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.merged import export_merged
from finetune.checkpoint.resume import open_state
from finetune.checkpoint.trained import LoraFactors, split_trained
from finetune.checkpoint.weights import from_pretrained
from finetune.distributed import world as worlds
from finetune.distributed.expert_exchange import attach
from finetune.engine import engine as engines
from finetune.engine.optimizer import MOMENTS, learning_rate, parameter_groups
from finetune.kernels.torch.experts import experts_grouped
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.model.moe import ExpertCompute, ExpertFactors, Experts, LowRank, experts_in_a_loop
from finetune.training.lora import AdapterError, base_model, inject
from finetune.training.router_loss import count_rows, router_loss
from finetune.training.step import optimize, token_counts
from tests.checkpoints import write_checkpoint
from tests.configs import tiny_config
from tests.ranks import ranks
from tests.test_model import GRADIENT_TOLERANCE, LOGITS_TOLERANCE, pair, random_model
from tests.test_rank_layouts import CONFIG, PACKS, STEPS, TOKENS, Layout, assembled, batch_of_step, model_of, recipe_of
from tests.tiny_checkpoints import all_tensors, assert_same_tensors, save_released, transformers_model

RANK, ALPHA = 3, 5.0
TARGETS = ("q_proj", "o_proj", "in_proj_qkvz", "out_proj", "experts")
VALUES = {
    "base": tiny_config(),
    "dense-layers": tiny_config(mlp_only_layers=[0, 3], num_experts_per_tok=3),
    "odd-widths": tiny_config(num_experts=5, hidden_size=28, moe_intermediate_size=9),
}
MATRICES = ("gate_up_proj", "down_proj")


def adapted(
    model: HybridMoEForCausalLM, targets: tuple[str, ...] = TARGETS, *, rslora: bool = False
) -> HybridMoEForCausalLM:
    """`model` with factors that are not zero, the same for an expert wherever it is."""
    inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=targets, seed=0, rslora=rslora)
    for name, parameter in model.named_parameters():
        if ".mlp.experts.lora_B." in name:
            for place, expert in enumerate(model.local_experts):
                fill(parameter.data[place], f"{name}{expert}")
        elif ".lora_B." in name:
            fill(parameter.data, name, 0.02)  # of every token, so that it takes less to change the logits
    return model


def fill(value: Tensor, key: str, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(key.encode(), "big") % 2**31)
    value.copy_(std * torch.randn(value.shape, generator=generator))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def some_ids(values: dict[str, Any]) -> Tensor:
    return torch.randint(values["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(3))


# The kernel


HIDDEN, WIDTH = 16, 8
ROWS_PER_EXPERT = {
    "no-rows-at-all": [0, 0, 0],
    "one-row": [0, 1, 0],
    "63-rows": [3, 1, 52, 7],
    "130-rows-some-experts-without": [0, 5, 0, 0, 125, 0],
    "one-expert": [65],
}


def expert_tensors(counts: list[int], rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows, both weights, and A and B of each."""
    experts = len(counts)
    shapes = [
        (sum(counts), HIDDEN),
        *((experts, 2 * WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)),
        *((experts, rank, HIDDEN), (experts, 2 * WIDTH, rank)),
        *((experts, rank, WIDTH), (experts, HIDDEN, rank)),
    ]
    rows, *matrices = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [rows, *(matrix / matrix.shape[-1] ** 0.5 for matrix in matrices)]


def forward_and_backward(
    compute: ExpertCompute, counts: list[int], tensors: list[Tensor], *, weights_train: bool
) -> list[Tensor]:
    """The output, and the gradients of rows, factors and (where they train) weights."""
    rows, gate_up, down, *pairs = (tensor.clone().requires_grad_() for tensor in tensors)
    if not weights_train:
        gate_up, down = gate_up.detach(), down.detach()
    factors = ExpertFactors(LowRank(pairs[0], pairs[1], 0.7), LowRank(pairs[2], pairs[3], 0.7))
    out = compute(rows, torch.tensor(counts), gate_up, down, factors)
    inputs = [rows, *pairs, *([gate_up, down] if weights_train else [])]
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 1, HIDDEN, dtype=out.dtype)).sum(), inputs)]


@pytest.mark.parametrize("weights_train", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("layout", ROWS_PER_EXPERT)
def test_grouped_is_the_loop(layout: str, rank: int, weights_train: bool) -> None:
    counts = ROWS_PER_EXPERT[layout]
    tensors = expert_tensors(counts, rank)
    found, expected = (
        forward_and_backward(compute, counts, tensors, weights_train=weights_train)
        for compute in (experts_grouped, experts_in_a_loop)
    )
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compute", [experts_grouped, experts_in_a_loop])
def test_factors_are_what_they_would_be_merged(compute: ExpertCompute) -> None:
    counts = ROWS_PER_EXPERT["63-rows"]
    rows, gate_up, down, *pairs = (tensor.double() for tensor in expert_tensors(counts, RANK))
    merged = experts_in_a_loop(
        rows, torch.tensor(counts), gate_up + 0.7 * pairs[1] @ pairs[0], down + 0.7 * pairs[3] @ pairs[2]
    )
    pairs = [tensor.float() for tensor in pairs]
    factors = ExpertFactors(LowRank(pairs[0], pairs[1], 0.7), LowRank(pairs[2], pairs[3], 0.7))
    found = compute(rows.float(), torch.tensor(counts), gate_up.float(), down.float(), factors)
    torch.testing.assert_close(found.double(), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 8])
def test_grouped_takes_any_rank_in_bfloat16(rank: int) -> None:
    """3 bfloat16 numbers are no multiple of the 16 bytes that the grouped product asks of a row."""
    counts = ROWS_PER_EXPERT["63-rows"]
    tensors = expert_tensors(counts, rank, torch.bfloat16)
    found = forward_and_backward(experts_grouped, counts, tensors, weights_train=False)
    exact = forward_and_backward(experts_in_a_loop, counts, [t.double() for t in tensors], weights_train=False)
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


class Largest(TorchDispatchMode):
    """Notes every new tensor of three dimensions that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 3 and not func.is_view:
            self.shapes.append(tuple(out.shape))
        return out


def test_frozen_weights_cost_no_tensor_of_their_size() -> None:
    counts = ROWS_PER_EXPERT["63-rows"]
    tensors = expert_tensors(counts, RANK)
    made = {}
    for weights_train in (False, True):
        with Largest() as noted:
            forward_and_backward(experts_grouped, counts, tensors, weights_train=weights_train)
        made[weights_train] = [shape for shape in noted.shapes if min(shape[1:]) > 4]  # a padded rank is 4
    copies = [tuple(tensor.shape) for tensor in tensors[1:3]]  # `forward_and_backward` clones them
    assert made[False] == copies
    assert len(made[True]) == 4


# Putting them in place


@pytest.mark.parametrize("name", VALUES)
def test_every_expert_is_adapted_and_nothing_else_changes(name: str) -> None:
    model = random_model(VALUES[name])
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    config = ModelConfig.from_dict(VALUES[name])
    modules = [f"model.layers.{layer}.mlp.experts" for layer in config.moe_layers]
    assert inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=("experts",), seed=0) == modules
    expected = {f"{module}.lora_{factor}.{matrix}" for module in modules for factor in "AB" for matrix in MATRICES}
    found = trainable(model)
    assert found.keys() == expected
    for module in modules:
        for matrix in MATRICES:
            experts, outputs, inputs = before[f"{module}.{matrix}"].shape
            a, b = found[f"{module}.lora_A.{matrix}"], found[f"{module}.lora_B.{matrix}"]
            assert (a.shape, b.shape) == ((experts, RANK, inputs), (experts, outputs, RANK))
            assert not b.any()
            assert a.abs().max() <= inputs**-0.5
            # Of a uniform draw up to 1 / sqrt(inputs), like peft's on linear layers.
            assert a.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.2)
    frozen = {key: p.detach() for key, p in model.named_parameters() if key not in expected}
    assert_same_tensors(frozen, before)


def test_mixed_targets_are_named_in_order_and_counted() -> None:
    model = random_model(VALUES["base"])
    names = inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS, seed=0)
    assert [name.rpartition(".")[2] for name in names] == ["in_proj_qkvz", "out_proj", "experts"] * 3 + [
        "q_proj",
        "o_proj",
        "experts",
    ]
    assert len(trainable(model)) == 8 * 2 + 4 * 4


def test_an_expert_draws_the_same_wherever_it_is() -> None:
    drawn = {}
    for key, seed, experts in (("whole", 7, None), ("part", 7, range(4, 8)), ("other", 8, None)):
        model = HybridMoEForCausalLM(ModelConfig.from_dict(VALUES["base"]), experts)
        inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=("experts",), seed=seed)
        drawn[key] = {name: p.detach() for name, p in trainable(model).items() if "lora_A" in name}
    seen = [value[expert].flatten()[:5].tolist() for value in drawn["whole"].values() for expert in range(8)]
    assert len({tuple(values) for values in seen}) == 8 * 8  # every expert of every layer and matrix has its own
    for name, value in drawn["part"].items():
        assert torch.equal(value, drawn["whole"][name][4:])
        assert not torch.equal(drawn["other"][name], drawn["whole"][name])


def test_adapters_start_as_nothing_and_switch_off_whole() -> None:
    model, ids = random_model(VALUES["base"]), some_ids(VALUES["base"])
    base = logits(model, ids)
    inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=("experts",), seed=0)
    assert torch.equal(logits(model, ids), base)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            fill(parameter.data, name)
    changed = logits(model, ids)
    assert (changed - base).abs().max() > 0.1
    with base_model(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), changed)
    with pytest.raises(KeyError), base_model(model):
        raise KeyError
    assert torch.equal(logits(model, ids), changed)


def test_a_model_without_experts_is_refused() -> None:
    model = random_model(tiny_config(mlp_only_layers=[0, 1, 2, 3]))
    with pytest.raises(AdapterError, match=r"^lora\.targets: no layer of this model has experts; leave it out$"):
        inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=("q_proj", "experts"), seed=0)


# Against peft on transformers


def as_peft_stores(value: Tensor, factor: str) -> Tensor:
    """Our stack of factors in peft's shape: A of all experts below each other, B with the experts innermost."""
    return value.flatten(0, 1) if factor == "A" else value.permute(1, 2, 0).flatten(1)


@pytest.mark.parametrize("compute", [experts_grouped, experts_in_a_loop])
@pytest.mark.parametrize("name", ["base", "dense-layers"])
def test_logits_and_factor_gradients_equal_peft_on_transformers(name: str, compute: ExpertCompute) -> None:
    ours, theirs = pair(VALUES[name])
    adapted(ours, ("experts",))
    for module in ours.modules():
        if isinstance(module, Experts):
            module.compute = compute
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    inject_adapter_in_model(config, theirs)
    counterparts = {}
    for key, parameter in trainable(ours).items():
        experts, factor, matrix = key.rpartition(".lora_")[0], key.split(".lora_")[1][0], key.rpartition(".")[2]
        wrapper = experts if matrix == "down_proj" else f"{experts}.base_layer"
        counterparts[key] = theirs.get_parameter(f"{wrapper}.lora_{factor}.default.weight")
        with torch.no_grad():
            counterparts[key].copy_(as_peft_stores(parameter, factor))
    assert len(counterparts) == len(trainable(theirs)) > 0

    ids = some_ids(VALUES[name])
    expected, found = theirs(ids, use_cache=False).logits, ours(ids).logits
    with base_model(ours):
        assert (logits(ours, ids) - found).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_TOLERANCE)
    weight = torch.randn(expected.shape)
    for out in (expected, found):
        (out * weight).sum().backward()
    for key, parameter in trainable(ours).items():
        assert parameter.grad is not None
        gradient, wanted = as_peft_stores(parameter.grad, key.split(".lora_")[1][0]), counterparts[key].grad
        assert (gradient - wanted).abs().max() <= GRADIENT_TOLERANCE * wanted.abs().max() > 0, key


# Export


def training_state(model: HybridMoEForCausalLM) -> dict[str, Tensor]:
    """What trains, under the names that the engine stores."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        if ".mlp.experts." in name:
            tensors |= {f"{name}::fp32::{e}": value.clone() for e, value in enumerate(parameter.detach())}
        else:
            tensors[f"{name}::fp32"] = parameter.detach().clone()
    return tensors


def trained(model: HybridMoEForCausalLM, *, rslora: bool = False) -> LoraFactors:
    factors, replaced = split_trained(training_state(model), alpha=ALPHA, dropout=0.0, rslora=rslora)
    assert factors is not None
    assert not replaced
    return factors


@pytest.fixture(scope="module", params=["base", "dense-layers"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("base")
    return request.param, save_released(transformers_model(VALUES[request.param]), folder / "base")


@pytest.mark.parametrize("targets", [TARGETS, ("experts",)], ids=["mixed", "experts-only"])
def test_merged_and_adapter_give_the_logits_of_training(
    base: tuple[str, Path], targets: tuple[str, ...], tmp_path: Path
) -> None:
    name, folder = base
    ids = some_ids(VALUES[name])
    ours = adapted(from_pretrained(folder, dtype=torch.float32), targets).eval()
    expected = logits(ours, ids)
    assert (logits(from_pretrained(folder, dtype=torch.float32), ids) - expected).abs().max() > 0.1

    changed = export_merged(folder, tmp_path / "merged", adapter=trained(ours), replaced={}).changed
    merged, report = Qwen3NextForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=LOGITS_TOLERANCE)
    layers = ModelConfig.from_dict(VALUES[name]).moe_layers
    assert sum(".mlp.experts." in tensor for tensor in changed) == len(layers) * 8 * 3

    modules = export_adapter(folder, tmp_path / "adapter", adapter=trained(ours), replaced={}, base_name="x").modules
    assert sum(module.endswith(".mlp.experts") for module in modules) == len(layers)
    theirs = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=LOGITS_TOLERANCE)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_parameters"] == sorted(
        f"model.layers.{layer}.mlp.experts.{m}" for layer in layers for m in MATRICES
    )


def test_a_rank_stabilised_scale_is_in_both_exports(tmp_path: Path) -> None:
    folder, ids = save_released(transformers_model(VALUES["base"]), tmp_path / "base"), some_ids(VALUES["base"])
    ours = adapted(from_pretrained(folder, dtype=torch.float32), rslora=True).eval()
    expected, factors = logits(ours, ids), trained(ours, rslora=True)
    other = logits(adapted(from_pretrained(folder, dtype=torch.float32)).eval(), ids)
    assert (other - expected).abs().max() > 100 * LOGITS_TOLERANCE
    export_merged(folder, tmp_path / "merged", adapter=factors, replaced={})
    merged = Qwen3NextForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=LOGITS_TOLERANCE)
    export_adapter(folder, tmp_path / "adapter", adapter=factors, replaced={}, base_name="x")
    theirs = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_each_stored_matrix_is_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    folder = save_released(transformers_model(VALUES["base"], torch.bfloat16), tmp_path / "base")
    before = all_tensors(folder)
    model = adapted(from_pretrained(folder, dtype=torch.float32), ("experts",))
    changed = export_merged(folder, tmp_path / "merged", adapter=trained(model), replaced={}).changed
    factors = {name: p.detach() for name, p in trainable(model).items()}
    expected = dict(before)
    for layer in range(4):
        module = f"model.layers.{layer}.mlp.experts"
        for expert in range(8):
            both, down = (
                ALPHA / RANK * factors[f"{module}.lora_B.{m}"][expert] @ factors[f"{module}.lora_A.{m}"][expert]
                for m in MATRICES
            )
            for part, growth in (("gate", both[:16]), ("up", both[16:]), ("down", down)):
                name = f"{module}.{expert}.{part}_proj.weight"
                expected[name] = before[name].float() + growth
    found = all_tensors(tmp_path / "merged")
    assert set(changed) == {name for name in before if ".mlp.experts." in name and not name.startswith("mtp.")}
    for name, value in expected.items():
        if name in changed:
            assert found[name].dtype == torch.bfloat16
            assert (found[name].float() - value).abs().max() <= value.abs().max() * 2**-8, name
            assert (found[name] == value.bfloat16()).float().mean() > 0.99, name
        else:
            assert torch.equal(found[name], value), name


def test_a_base_with_stacked_experts_is_merged_alike(base: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = base
    transformers_model(VALUES[name]).save_pretrained(tmp_path / "stacked", save_original_format=False)
    factors = trained(adapted(from_pretrained(folder, dtype=torch.float32), ("experts",)))
    for source, to in ((folder, "one"), (tmp_path / "stacked", "other")):
        export_merged(source, tmp_path / to, adapter=factors, replaced={})
    one, other = (Qwen3NextForCausalLM.from_pretrained(tmp_path / to, dtype=torch.float32) for to in ("one", "other"))
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=1e-6)


LAYER = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{LAYER}.lora_B.down_proj::fp32::5": None},
            r"factors of experts are missing from the training state: model\.layers\.1\.mlp\.experts\.down_proj::5::B",
        ),
        (
            {f"{LAYER}.lora_A.gate_up_proj::fp32::8": torch.zeros(RANK, 32)},
            r"no place in the model: model\.layers\.1\.mlp\.experts\.gate_up_proj::8::A",
        ),
        (
            {f"{LAYER}.lora_A.gate_up_proj::fp32::2": torch.zeros(RANK, 31)},
            r"gate_up_proj::2: \[32, 3\] x \[3, 31\] does not make \[32, 32\]",
        ),
        (
            {
                f"{LAYER}.lora_A.gate_up_proj::fp32::2": torch.zeros(RANK + 1, 32),
                f"{LAYER}.lora_B.gate_up_proj::fp32::2": torch.zeros(32, RANK + 1),
            },
            r"gate_up_proj::2: \[32, 4\] x \[4, 32\] does not make \[32, 32\]",
        ),
        (
            {f"{LAYER}.lora_{f}.{m}::fp32::{e}": None for f in "AB" for m in MATRICES[1:] for e in range(8)},
            r"factors of experts are missing from the training state: model\.layers\.1\.mlp\.experts\.down_proj::0::A",
        ),
    ],
    ids=["half-missing", "no-such-expert", "too-narrow", "another-rank", "matrix-missing"],
)
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_every_expert_or_none(kind: str, change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    folder = save_released(transformers_model(VALUES["base"]), tmp_path / "base")
    state: dict[str, Any] = training_state(adapted(from_pretrained(folder, dtype=torch.float32))) | change
    state = {name: value for name, value in state.items() if value is not None}
    factors, _ = split_trained(state, alpha=ALPHA, dropout=0.0)
    export = export_merged if kind == "merged" else partial(export_adapter, base_name="x")
    with pytest.raises(CheckpointError, match=message):
        export(folder, tmp_path / "out", adapter=factors, replaced={})
    assert not (tmp_path / "out").exists()


# Training


STARVED = "starved"  # experts 4 to 7, all of the second of two ranks, never get a row
LAYOUTS = [
    Layout(),
    Layout(ranks=2, expert=2, accumulation=2, recompute=True),
    Layout(ranks=4, expert=2, stage=1),
    Layout(ranks=2, expert=2, train=STARVED),
]


def model_to_train(experts: range, layout: Layout) -> HybridMoEForCausalLM:
    model = adapted(model_of(experts, layout))
    for name, parameter in model.named_parameters():
        if layout.train == STARVED:
            # Every token has a large positive entry, which the router reads as for the first experts and no other.
            if name == "model.embed_tokens.weight":
                parameter.data[:, 0] = 4
            elif name.endswith("mlp.gate.weight"):
                parameter.data[:4, 0], parameter.data[4:, 0] = 10, -10
        elif name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(True)
    return model


def train_on_rank(rank: int, layout: Layout, folder: str) -> dict[str, Any]:
    recipe = recipe_of(layout)
    world = worlds.start(layout.expert)
    model = model_to_train(world.experts(CONFIG.num_experts), layout)
    if world.expert_group is not None:
        attach(model, world.expert_group)
    engine = engines.start(model, recipe, world, accumulation=layout.accumulation)
    norms = []
    for step in range(1, STEPS + 1):
        packs = PACKS // layout.ranks // layout.accumulation
        mine = [
            Batch(*(t.view(layout.accumulation, layout.ranks, packs, TOKENS)[m, rank] for t in batch_of_step(step)))
            for m in range(layout.accumulation)
        ]
        engines.set_learning_rate(engine, learning_rate(step, steps=STEPS, optim=recipe.optim))
        norms.append(optimize(engine, mine, recipe.router, world))
    state = engines.training_state(engine, world)
    write_checkpoint(Path(folder), STEPS, tensors=state, state={}, rank=rank, ranks=layout.ranks)
    return {"norm": norms, "state": state}


def train_in_plain_torch(layout: Layout) -> dict[str, Any]:
    """The oracle: the whole batch at once, with the definition of the experts."""
    recipe = recipe_of(layout)
    optim = recipe.optim
    model = model_to_train(range(CONFIG.num_experts), layout)
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = experts_in_a_loop
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    groups = parameter_groups(model, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    norms, rows = [], []
    for step in range(1, STEPS + 1):
        batch = batch_of_step(step)
        supervised, tokens = token_counts([batch]).unbind()
        output = model(batch.input_ids, batch.segment_ids, labels=batch.labels)
        rows.append(count_rows(output.routings))
        shares = (rows[-1] / rows[-1].sum(1, keepdim=True)).float()
        router = router_loss(output.routings, batch.segment_ids, recipe.router, step_shares=shares, step_tokens=tokens)
        (output.loss_sum / supervised + router).float().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(trainable(model).values()), optim.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=STEPS, optim=optim)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: p.detach() for name, p in trainable(model).items()}
    return {"norm": norms, "rows": torch.stack(rows), "state": state, "before": before}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], tuple[list[dict[str, Any]], Path]]:
    """What every rank gave in this layout, and the folder of the checkpoint; trained when first asked for."""
    done: dict[Layout, tuple[list[dict[str, Any]], Path]] = {}

    def train(layout: Layout) -> tuple[list[dict[str, Any]], Path]:
        if layout not in done:
            folder = tmp_path_factory.mktemp("run")
            done[layout] = ranks(layout.ranks, train_on_rank, layout, str(folder)), folder / f"step-{STEPS}"
        return done[layout]

    return train


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_equals_one_big_batch_in_plain_torch(
    layout: Layout, run: Callable[[Layout], tuple[list[dict[str, Any]], Path]]
) -> None:
    expected = train_in_plain_torch(layout)
    assert bool(expected["rows"][:, :, 4:].any()) is (layout.train != STARVED)
    parts, _ = run(layout)
    assert parts[0]["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    state = assembled(parts, "fp32")
    assert state.keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        difference, moved = (state[name] - value).abs().max(), (value - expected["before"][name]).abs().max()
        assert difference <= min(1e-5, 1e-3 * moved), f"{name}: off by {difference:.2e} after moving by {moved:.2e}"


def restore_on_rank(rank: int, layout: Layout, folder: str) -> dict[str, Tensor]:
    world = worlds.start(layout.expert)
    model = model_to_train(world.experts(CONFIG.num_experts), layout)
    for parameter in trainable(model).values():
        parameter.data.zero_()
    engine = engines.start(model, recipe_of(layout), world, accumulation=1)
    _, stored = open_state(Path(folder))
    engines.restore(engine, stored.__getitem__, step=STEPS)
    for name, parameter in trainable(model).items():  # the weights that the next forward pass uses
        if ".lora_A." in name and ".mlp.experts." in name:
            for place, expert in enumerate(model.local_experts):
                assert torch.equal(parameter[place], stored[f"{name}::fp32::{expert}"])
    return engines.training_state(engine, world)


@pytest.mark.parametrize(("before", "after"), [(LAYOUTS[0], 2), (LAYOUTS[1], 1)], ids=["1-to-2", "2-to-1"])
def test_a_run_resumes_at_another_expert_parallel_size(
    before: Layout, after: int, run: Callable[[Layout], tuple[list[dict[str, Any]], Path]]
) -> None:
    parts, checkpoint = run(before)
    trained_state = {name: value for part in parts for name, value in part["state"].items()}
    again = ranks(after, restore_on_rank, Layout(ranks=after, expert=after), str(checkpoint))
    restored = {name: value for part in again for name, value in part.items()}
    assert_same_tensors(restored, trained_state)
    expected = {
        f"model.layers.{layer}.mlp.experts.lora_{factor}.{matrix}::{kind}::{expert}"
        for layer in CONFIG.moe_layers
        for factor in "AB"
        for matrix in MATRICES
        for kind in ("fp32", *MOMENTS)
        for expert in range(CONFIG.num_experts)
    }
    assert {name for name in restored if ".mlp.experts." in name} == expected
    # What a run stores is what the exports read.
    factors, replaced = split_trained(open_state(checkpoint)[1], alpha=ALPHA, dropout=0.0)
    assert factors is not None
    assert len(factors.experts) == len(expected) // 3
    assert all(name.endswith("mlp.gate.weight") for name in replaced)
