import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextForCausalLM

from finetune.checkpoint import adapter, merged
from finetune.checkpoint.adapter import REDIRECTED_BY_PEFT, export_adapter
from finetune.checkpoint.copying import check_written
from finetune.checkpoint.layout import CheckpointError, is_expert_parameter
from finetune.checkpoint.merged import export_merged
from finetune.checkpoint.resume import open_state
from finetune.checkpoint.shards import read_header
from finetune.checkpoint.trained import LoraFactors, split_trained
from finetune.checkpoint.weights import from_pretrained
from finetune.training.lora import inject
from tests.checkpoints import write_checkpoint
from tests.configs import CONFIGS, randomise, tiny_config
from tests.tiny_checkpoints import COMPANIONS, MTP, all_tensors, assert_same_tensors, save_released, transformers_model

MIXER = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj")
RANK, ALPHA = 3, 5.0
# 8 layers have 26 targets: from 20 on, peft shortens the list of names it is given.
VALUES = {**CONFIGS, "eight-layers": tiny_config(num_hidden_layers=8, mlp_only_layers=[2])}
TOKENS = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Sharded checkpoints by configuration, with `mtp.*`, made when first asked for; never written to."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(name, dtype=torch.float32):
        key = f"{name}-{dtype}"
        if key not in made:
            made[key] = save_released(transformers_model(VALUES[name], dtype), folder / key)
        return made[key]

    return base


def adapted(base, targets=MIXER, router=False):
    """Our model with random adapters, as a run would have trained it."""
    model = from_pretrained(base, dtype=torch.float32)
    inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=targets, seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            if router and name.endswith(".mlp.gate.weight"):
                parameter.requires_grad_(True).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def training_state(model):
    """What trains, under the names that the trainer stores: experts one by one, moments beside the values."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pieces = {f"::{e}": parameter.detach()[e] for e in range(len(parameter))}
            for expert, value in (pieces if is_expert_parameter(name) else {"": parameter.detach()}).items():
                tensors[f"{name}::fp32{expert}"] = value.float().clone()
                tensors[f"{name}::exp_avg{expert}"] = torch.full_like(value, 1e30)
    return tensors


def trained(model):
    return split_trained(training_state(model), alpha=ALPHA, dropout=0.0)


def random_factors(modules, rank=RANK):
    return LoraFactors(
        rank, ALPHA, 0.0, {name: (torch.randn(rank, i), torch.randn(o, rank)) for name, (o, i) in modules.items()}
    )


@torch.no_grad()
def logits(model):
    out = model(TOKENS)
    return out.logits


def peft_model(base, model):
    """Base plus the adapters of our `model`, by peft on transformers' model: the oracle."""
    factors = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    targets = sorted({name.split(".lora_")[0] for name in factors})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0)
    theirs = get_peft_model(Qwen3NextForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    placed = theirs.load_state_dict(
        {f"base_model.model.{name}": value for name, value in factors.items()}, strict=False
    )
    assert not placed.unexpected_keys
    return theirs


@pytest.mark.parametrize("name", ["base", "odd-heads", "dense-layers"])
def test_merged_gives_the_logits_of_base_plus_adapter(name, bases, tmp_path):
    base, to = bases(name), tmp_path / "merged"
    ours = adapted(base)
    factors, replaced = trained(ours)
    export_merged(base, to, adapter=factors, replaced=replaced)
    theirs, report = Qwen3NextForCausalLM.from_pretrained(to, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    merged, plain = logits(theirs), logits(from_pretrained(base, dtype=torch.float32))
    assert (merged - plain).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(merged, logits(peft_model(base, ours)), rtol=0, atol=2e-5)
    torch.testing.assert_close(merged, logits(ours), rtol=0, atol=2e-5)
    torch.testing.assert_close(merged, logits(from_pretrained(to, dtype=torch.float32)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["base", "sparse-step-2-tied", "eight-layers"])
def test_merged_weights_are_those_that_peft_merges(name, bases, tmp_path):
    ours = adapted(bases(name))
    factors, replaced = trained(ours)
    changed = export_merged(bases(name), tmp_path / "merged", adapter=factors, replaced=replaced).changed
    assert sorted(changed) == sorted(f"{module}.weight" for module in factors.modules)
    expected = peft_model(bases(name), ours).merge_and_unload().state_dict()
    found = Qwen3NextForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-6, atol=1e-7)


def test_merged_holds_a_trained_router_and_adapters_of_the_shared_expert(bases, tmp_path):
    ours = adapted(bases("base"), targets=("q_proj", "shared_expert"), router=True)
    factors, replaced = trained(ours)
    assert len(replaced) == 4
    export_merged(bases("base"), tmp_path / "merged", adapter=factors, replaced=replaced)
    theirs = Qwen3NextForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=2e-5)
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(theirs.get_parameter(router), ours.get_parameter(router))


def test_merged_rounds_once_and_leaves_every_other_byte(bases, tmp_path):
    base, to = bases("base", torch.bfloat16), tmp_path / "merged"
    before = all_tensors(base)
    module = "model.layers.1.linear_attn.out_proj"
    factors = random_factors({module: tuple(before[f"{module}.weight"].shape)})
    assert export_merged(base, to, adapter=factors, replaced={}).changed == [f"{module}.weight"]
    a, b = factors.modules[module]
    exact = before[f"{module}.weight"].double() + ALPHA / RANK * b.double() @ a.double()
    after = all_tensors(to)
    assert (after[f"{module}.weight"].double() - exact).abs().max() <= exact.abs().max() * 2**-8
    expected = (before[f"{module}.weight"].float() + ALPHA / RANK * (b @ a)).bfloat16()
    assert_same_tensors(after, {**before, f"{module}.weight": expected})

    assert set(MTP) < set(after)
    for path in base.iterdir():
        content, copied = path.read_bytes(), (to / path.name).read_bytes()
        if path.suffix == ".safetensors":
            for name, stored in read_header(path).items():
                if name == f"{module}.weight":
                    content = content[: stored.start] + content[stored.end :]
                    copied = copied[: stored.start] + copied[stored.end :]
        assert content == copied, path.name
    assert {path.name for path in to.iterdir()} == {path.name for path in base.iterdir()}


@pytest.mark.parametrize("layout", ["released", "stacked", "none"])
@pytest.mark.parametrize("name", ["base", "dense-layers", "sparse-step-2-tied"])
def test_merged_holds_every_parameter_of_full_training(name, layout, bases, tmp_path):
    base, to = bases(name), tmp_path / "merged"
    if layout != "released":
        base = tmp_path / "base"
        transformers_model(VALUES[name]).save_pretrained(base, save_original_format=False)
    if layout == "none":
        (base / "model.safetensors").unlink()
    theirs = transformers_model(VALUES[name])
    randomise(theirs, seed=2)
    factors, replaced = split_trained(training_state(theirs), alpha=0.0, dropout=0.0)
    assert factors is None
    export_merged(base, to, adapter=None, replaced=replaced)
    loaded, report = Qwen3NextForCausalLM.from_pretrained(to, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_tensors(loaded.state_dict(), theirs.state_dict())
    assert any(name.endswith("experts.gate_up_proj") for name in all_tensors(to)) == (layout == "stacked")
    assert (to / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_run_from_scratch_is_stored_as_its_configuration_says(bases, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", *COMPANIONS):
        shutil.copyfile(bases("base", torch.bfloat16) / name, base / name)
    theirs = transformers_model(VALUES["base"])
    _, replaced = split_trained(training_state(theirs), alpha=0.0, dropout=0.0)
    export_merged(base, tmp_path / "merged", adapter=None, replaced=replaced)
    tensors = all_tensors(tmp_path / "merged")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = Qwen3NextForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert_same_tensors(again.state_dict(), theirs.bfloat16().state_dict())
    incomplete = {name: replaced[name] for name in replaced if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"neither the base nor the training state holds model\.norm\.weight"):
        export_merged(base, tmp_path / "again", adapter=None, replaced=incomplete)


def test_a_stored_head_follows_the_embeddings_it_is_tied_to(tmp_path):
    base = save_released(transformers_model(VALUES["sparse-step-2-tied"]), tmp_path / "base", shard="1GB", mtp=False)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors")
    new = torch.randn_like(tensors["lm_head.weight"])
    export_merged(base, tmp_path / "merged", adapter=None, replaced={"model.embed_tokens.weight": new})
    after = all_tensors(tmp_path / "merged")
    assert torch.equal(after["lm_head.weight"], new)
    assert torch.equal(after["model.embed_tokens.weight"], new)


def test_what_a_training_checkpoint_holds_is_exported_from_its_files(bases, tmp_path):
    ours = adapted(bases("base"), router=True)
    path = write_checkpoint(tmp_path / "checkpoints", 4, tensors=training_state(ours), state={})
    factors, replaced = split_trained(open_state(path)[1], alpha=ALPHA, dropout=0.0)
    export_merged(bases("base"), tmp_path / "merged", adapter=factors, replaced=replaced)
    theirs = Qwen3NextForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["base", "eight-layers"])
@pytest.mark.parametrize("targets", [MIXER, ("q_proj", "out_proj")], ids=["all", "two"])
def test_adapter_loads_with_stock_peft_and_gives_the_same_logits(name, targets, bases, tmp_path):
    base, to = bases(name), tmp_path / "adapter"
    ours = adapted(base, targets)
    factors, replaced = trained(ours)
    modules = export_adapter(base, to, adapter=factors, replaced=replaced, base_name="Qwen/Qwen3-Coder-Next").modules
    theirs = PeftModel.from_pretrained(Qwen3NextForCausalLM.from_pretrained(base, dtype=torch.float32), to).eval()
    wrapped = [name for name, module in theirs.named_modules() if isinstance(module, BaseTunerLayer)]
    assert sorted(wrapped) == [f"base_model.model.{module}" for module in modules]
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=2e-5)
    config = json.loads((to / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5, "Qwen/Qwen3-Coder-Next")
    assert config["target_modules"] == modules
    keys = {f"base_model.model.{module}.lora_{factor}.weight" for module in modules for factor in "AB"}
    assert set(load_file(to / "adapter_model.safetensors")) == keys


def test_an_adapter_of_some_layers_stays_on_them(bases, tmp_path):
    """`q_proj` of one layer only: a suffix would reach the other layers too."""
    shapes = {name: tuple(tensor.shape) for name, tensor in all_tensors(bases("eight-layers")).items()}
    chosen = [name for name in shapes if name.endswith("proj.weight") and "linear_attn" in name]
    modules = {
        name.removesuffix(".weight"): shapes[name] for name in (*chosen, "model.layers.3.self_attn.q_proj.weight")
    }
    export_adapter(
        bases("eight-layers"), tmp_path / "adapter", adapter=random_factors(modules), replaced={}, base_name="base"
    )
    plain = Qwen3NextForCausalLM.from_pretrained(bases("eight-layers"), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    wrapped = {name for name, module in theirs.named_modules() if isinstance(module, BaseTunerLayer)}
    assert wrapped == {f"base_model.model.{module}" for module in modules}


def test_peft_redirects_the_names_that_an_adapter_refuses(bases):
    """Why they are refused; when peft changes this, so can we."""
    redirected = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING["qwen2_moe"]
    assert set(redirected) == set(REDIRECTED_BY_PEFT)
    model = Qwen3NextForCausalLM.from_pretrained(bases("base"), dtype=torch.float32)
    shared = [f"model.layers.0.mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    get_peft_model(model, LoraConfig(r=2, target_modules=shared, lora_dropout=0.0))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert wrapped
    assert not any("shared_expert" in name for name in wrapped)


Q_PROJ = "model.layers.3.self_attn.q_proj"


def homeless(module, out=32, inner=32):
    return {"adapter": random_factors({module: (out, inner)}), "replaced": {}}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            homeless("model.layers.9.self_attn.q_proj", 128),
            r"model\.layers\.9\.self_attn\.q_proj: the model has no such",
        ),
        (
            homeless("model.layers.0.self_attn.q_proj", 128),
            r"model\.layers\.0\.self_attn\.q_proj: the model has no such",
        ),
        (homeless("model.layers.0.linear_attn.conv1d"), r"conv1d: the model has no such matrix"),
        (homeless(Q_PROJ, 128, 31), r"q_proj\.weight: \[128, 3\] x \[3, 31\] does not make \[128, 32\]"),
        (
            {"adapter": None, "replaced": {"model.layers.0.mlp.gate.bias": torch.zeros(8)}},
            r"trained tensors have no place in the model: model\.layers\.0\.mlp\.gate\.bias",
        ),
        (
            {"adapter": None, "replaced": {"model.layers.0.mlp.experts.down_proj::8": torch.zeros(32, 16)}},
            r"trained tensors have no place in the model: model\.layers\.0\.mlp\.experts\.down_proj::8",
        ),
        (
            {
                "adapter": None,
                "replaced": {f"model.layers.0.mlp.experts.down_proj::{e}": torch.zeros(32, 16) for e in range(7)},
            },
            r"trained experts are missing from the training state: model\.layers\.0\.mlp\.experts\.down_proj::7",
        ),
        (
            {
                "adapter": None,
                "replaced": {f"model.layers.0.mlp.experts.gate_up_proj::{e}": torch.zeros(33, 32) for e in range(8)},
            },
            r"trained model\.layers\.0\.mlp\.experts\.gate_up_proj::0: \[33, 32\] does not make \[32, 32\]",
        ),
        (
            {"adapter": None, "replaced": {"model.norm.weight": torch.zeros(31)}},
            r"trained model\.norm\.weight: \[31\] does not make \[32\]",
        ),
        (
            {"adapter": None, "replaced": {"model.norm.weight": torch.full((32,), torch.inf)}},
            r"model\.norm\.weight: holds infinite or undefined numbers after training",
        ),
        ({"adapter": None, "replaced": {}}, "holds no trained weights; there is nothing to export"),
    ],
)
def test_nothing_trained_is_dropped_and_nothing_is_left_behind(what, message, bases, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        export_merged(bases("base"), tmp_path / "merged", **what)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            homeless("model.layers.9.self_attn.q_proj", 128),
            r"model\.layers\.9\.self_attn\.q_proj: the model has no such",
        ),
        (homeless(Q_PROJ, 127), r"does not make \[128, 32\]"),
        (
            homeless("model.layers.0.mlp.shared_expert.gate_proj", 24),
            r"peft would load the factors of model\.layers\.0\.mlp\.shared_expert\.gate_proj on the routed experts",
        ),
        (
            {**homeless(Q_PROJ, 128), "replaced": {"model.layers.0.mlp.gate.weight": torch.zeros(8, 32)}},
            r"trained parameters themselves \(model\.layers\.0\.mlp\.gate\.weight\), which an adapter cannot hold",
        ),
        ({"adapter": None, "replaced": {}}, "trained nothing by LoRA, which an adapter cannot hold"),
    ],
)
def test_an_adapter_that_cannot_hold_the_training_is_refused(what, message, bases, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        export_adapter(bases("base"), tmp_path / "adapter", base_name="base", **what)
    assert list(tmp_path.iterdir()) == []


def test_a_base_too_coarse_to_merge_into_is_refused(bases, tmp_path):
    base = shutil.copytree(bases("base"), tmp_path / "base")
    gate = "model.layers.0.mlp.gate.weight"
    path = base / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][gate]
    tensors = load_file(path)
    save_file({**tensors, gate: tensors[gate].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(CheckpointError, match=r"1 tensors hold F8_E4M3, which does not train.*mlp\.gate\.weight"):
        export_merged(base, tmp_path / "merged", adapter=None, replaced={gate: torch.zeros(8, 32)})


def flip(path, place):
    """Change one bit of a file, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def place_of(folder, name):
    """File and first byte of a stored tensor."""
    return next(
        (path, stored.start)
        for path in folder.glob("*.safetensors")
        for tensor, stored in read_header(path).items()
        if tensor == name
    )


SABOTAGE = {
    "a merged tensor": lambda folder: place_of(folder, "model.norm.weight"),
    "a copied tensor": lambda folder: place_of(folder, "model.embed_tokens.weight"),
    "a carried tensor": lambda folder: place_of(folder, "mtp.norm.weight"),
    "a header": lambda folder: (place_of(folder, "model.norm.weight")[0], 12),
    "the index": lambda folder: (folder / "model.safetensors.index.json", 30),
    "the configuration": lambda folder: (folder / "config.json", 40),
    "the tokenizer": lambda folder: (folder / "tokenizer.json", 5),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_what_does_not_read_back_is_never_given_its_name(what, bases, tmp_path, monkeypatch):
    damaged = []

    def on_a_bad_disk(folder, hashes):
        path, place = SABOTAGE[what](folder)
        flip(path, place)
        damaged.append(path.name)
        check_written(folder, hashes)

    monkeypatch.setattr(merged, "check_written", on_a_bad_disk)
    with pytest.raises(CheckpointError) as raised:
        export_merged(bases("base"), tmp_path / "out", adapter=None, replaced={"model.norm.weight": torch.ones(32)})
    assert str(raised.value) == f"{damaged[0]}: not read back as written; check the disk, then export again"
    assert list(tmp_path.iterdir()) == []


def test_a_new_checkpoint_that_does_not_read_back_is_never_given_its_name(bases, tmp_path, monkeypatch):
    write = merged.write_shards

    def on_a_bad_disk(folder, *rest):
        write(folder, *rest)
        flip(*place_of(folder, "model.norm.weight"))

    monkeypatch.setattr(merged, "write_shards", on_a_bad_disk)
    theirs = transformers_model(VALUES["base"])
    _, replaced = split_trained(training_state(theirs), alpha=0.0, dropout=0.0)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight not read back as written; check the disk"):
        export_merged(bases("base"), tmp_path / "out", adapter=None, replaced=replaced, from_base=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["weights", "rank", "alpha", "scale", "target"])
def test_an_adapter_that_does_not_read_back_is_never_given_its_name(what, bases, tmp_path, monkeypatch):
    check = adapter._check

    def on_a_bad_disk(folder, *rest):
        if what == "weights":
            flip(folder / adapter.WEIGHTS, -1)
        else:
            path = folder / adapter.CONFIG
            pair = {
                "rank": ('"r": 3', '"r": 2'),
                "alpha": ('"lora_alpha": 5', '"lora_alpha": 6'),
                "scale": ('"use_rslora": false', '"use_rslora": true'),
                "target": ("q_proj", "k_proj"),
            }[what]
            path.write_text(path.read_text().replace(*pair))
        check(folder, *rest)

    monkeypatch.setattr(adapter, "_check", on_a_bad_disk)
    with pytest.raises(CheckpointError, match="not read back as written; check the disk, then export again"):
        export_adapter(bases("base"), tmp_path / "out", base_name="base", **homeless(Q_PROJ, 128))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_no_index_lists_are_carried_or_named(bases, tmp_path):
    base = shutil.copytree(bases("base"), tmp_path / "base")
    save_file({"mtp.extra.weight": torch.ones(7)}, base / "mtp.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, base / "consolidated.safetensors")
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / "adapter_config.json").write_text("{}")
    (base / "original").mkdir()
    (base / ".gitattributes").touch()
    found = export_merged(base, tmp_path / "out", adapter=None, replaced={"model.norm.weight": torch.zeros(32)})
    assert (tmp_path / "out/mtp.safetensors").read_bytes() == (base / "mtp.safetensors").read_bytes()
    assert found.left_out == ["adapter_config.json", "consolidated.safetensors", "original/", "pytorch_model.bin"]
    assert "mtp.extra.weight" in found.copied
    stored = all_tensors(tmp_path / "out")
    assert (found.changed, len(found.copied)) == (["model.norm.weight"], len(stored) - 1)
    assert found.sentence().startswith(f"1 tensors merged, {len(stored) - 1} copied, and 6 files that are not weights")
    assert "; left out of the base: adapter_config.json, consolidated.safetensors, original/" in found.sentence()
    assert {path.name for path in base.iterdir()} - {path.name for path in (tmp_path / "out").iterdir()} == {
        *(".gitattributes", "original"),
        *("adapter_config.json", "consolidated.safetensors", "pytorch_model.bin"),
    }


def test_nothing_of_a_base_is_exported_with_a_model_that_was_not_made_from_it(bases, tmp_path):
    base = shutil.copytree(bases("base"), tmp_path / "base")
    save_file({"mtp.extra.weight": torch.ones(7)}, base / "mtp.safetensors")
    theirs = transformers_model(VALUES["base"])
    randomise(theirs, seed=2)
    _, replaced = split_trained(training_state(theirs), alpha=0.0, dropout=0.0)
    found = export_merged(base, tmp_path / "out", adapter=None, replaced=replaced, from_base=False)
    assert not [name for name in all_tensors(tmp_path / "out") if name.startswith("mtp.")]
    loaded = Qwen3NextForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same_tensors(loaded.state_dict(), theirs.state_dict())
    assert not found.copied
    assert "mtp.safetensors" in found.left_out
    incomplete = {name: replaced[name] for name in replaced if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"nor the training state holds model\.norm\.weight"):
        export_merged(base, tmp_path / "again", adapter=None, replaced=incomplete, from_base=False)


def test_numbers_of_the_base_that_are_not_finite_are_named(bases, tmp_path):
    base = shutil.copytree(bases("base", torch.bfloat16), tmp_path / "base")
    path, place = place_of(base, "model.embed_tokens.weight")
    content = bytearray(path.read_bytes())
    content[place : place + 2] = b"\xff\xff"
    path.write_bytes(content)
    found = export_merged(base, tmp_path / "out", adapter=None, replaced={"model.norm.weight": torch.ones(32)})
    assert found.sentence().endswith("; the base itself holds numbers that are not finite in model.embed_tokens.weight")


def test_a_damaged_training_state_is_refused():
    lone = {f"{Q_PROJ}.lora_A.default.weight::fp32": torch.zeros(3, 32)}
    with pytest.raises(CheckpointError, match=r"holds one LoRA factor of two for model\.layers\.3\.self_attn\.q_proj"):
        split_trained(lone, alpha=1.0, dropout=0.0)
    mixed = {
        f"{module}.lora_{factor}.default.weight::fp32": torch.zeros(rank, rank)
        for module, rank in ((Q_PROJ, 3), ("model.layers.3.self_attn.k_proj", 4))
        for factor in "AB"
    }
    with pytest.raises(CheckpointError, match=r"mixes LoRA ranks \[3, 4\]"):
        split_trained(mixed, alpha=1.0, dropout=0.0)


def test_exporting_never_touches_a_folder_with_something_in_it(bases, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="already exists and is not an empty folder"):
        export_merged(bases("base"), tmp_path, **homeless(Q_PROJ, 128))
