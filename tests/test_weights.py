import json
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from finetune.checkpoint import shards
from finetune.checkpoint.folder import TEMPORARY
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.weights import from_pretrained, load_weights, resolve_model, save_pretrained
from finetune.model.config import ModelConfig
from finetune.model.deltanet import DECAY_RATES
from finetune.model.model import HybridMoEForCausalLM
from tests.configs import CONFIGS, tiny_config
from tests.tiny_checkpoints import COMPANIONS, MTP, all_tensors, assert_same_tensors, save_released, transformers_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A sharded checkpoint of the base configuration, with `mtp.*`; never written to."""
    return save_released(transformers_model(CONFIGS["base"]), tmp_path_factory.mktemp("checkpoints") / "released")


@pytest.fixture
def copied(released, tmp_path):
    """One to damage."""
    return shutil.copytree(released, tmp_path / "copied")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_saves_we_load_we_save_transformers_loads(name, dtype, tmp_path):
    theirs = transformers_model(CONFIGS[name], dtype)
    base = save_released(theirs, tmp_path / "base")
    ours = from_pretrained(base, dtype=dtype)
    expected = {name: t.float() if name.endswith(DECAY_RATES) else t for name, t in theirs.state_dict().items()}
    assert_same_tensors(ours.state_dict(), expected)

    save_pretrained(ours, tmp_path / "saved", base=base, max_shard_bytes=30_000)
    again, report = Qwen3NextForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_tensors(again.state_dict(), theirs.state_dict())
    assert_same_tensors(all_tensors(tmp_path / "saved"), all_tensors(base))  # per-expert names, mtp.* included
    for companion in ("config.json", *COMPANIONS):
        assert (tmp_path / "saved" / companion).read_bytes() == (base / companion).read_bytes()


def test_stacked_experts_are_read_and_written_one_by_one(released, tmp_path):
    theirs = transformers_model(CONFIGS["base"])
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in all_tensors(tmp_path / "fused")
    ours = from_pretrained(tmp_path / "fused", dtype=torch.float32)
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    save_pretrained(ours, tmp_path / "saved", base=tmp_path / "fused")
    expected = {name: tensor for name, tensor in all_tensors(released).items() if name not in MTP}
    assert_same_tensors(all_tensors(tmp_path / "saved"), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_halves_of_the_experts_make_the_whole(fused, released, tmp_path):
    folder = released
    if fused:
        transformers_model(CONFIGS["base"]).save_pretrained(folder := tmp_path / "fused", save_original_format=False)
    whole = from_pretrained(folder, dtype=torch.float32).state_dict()
    first, second = (
        from_pretrained(folder, dtype=torch.float32, experts=experts).state_dict()
        for experts in (range(0, 4), range(4, 8))
    )
    joined = {name: torch.cat([first[name], second[name]]) if ".experts." in name else first[name] for name in whole}
    assert_same_tensors(joined, whole)


def test_loading_keeps_attributes_and_casts(released):
    with init_empty_weights():
        model = HybridMoEForCausalLM(ModelConfig.from_folder(released))
    experts, norm = model.model.layers[0].mlp.experts.down_proj, model.model.norm.weight
    experts.allreduce, experts.group_name = False, "ep_size_2"
    norm.requires_grad_(False)
    load_weights(model, released, torch.bfloat16)
    loaded = model.model.layers[0].mlp.experts.down_proj
    assert (loaded.allreduce, loaded.group_name, loaded.requires_grad) == (False, "ep_size_2", True)
    assert not model.model.norm.weight.requires_grad
    for name, parameter in model.named_parameters():
        assert not parameter.is_meta
        assert parameter.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
    expected = all_tensors(released)["model.layers.0.mlp.experts.5.down_proj.weight"]
    assert torch.equal(loaded[5], expected.bfloat16())


@pytest.mark.parametrize("stored", [True, False])
def test_tied_embeddings_are_one_parameter(stored, tmp_path):
    base = save_released(transformers_model(CONFIGS["sparse-step-2-tied"]), tmp_path / "base", shard="1GB", mtp=False)
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    if stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors")
    model = from_pretrained(base, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])

    if stored:
        tensors["lm_head.weight"][3, 3] += 1
        save_file(tensors, base / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            from_pretrained(base, dtype=torch.float32)


def test_each_tensor_keeps_the_dtype_it_is_stored_in(tmp_path):
    base = save_released(transformers_model(CONFIGS["base"], torch.bfloat16), tmp_path / "base", shard="1GB", mtp=False)
    tensors = load_file(base / "model.safetensors")
    decay = "model.layers.1.linear_attn.A_log"
    tensors[decay] = tensors[decay].float() + 1e-6
    save_file(tensors, base / "model.safetensors")
    model = from_pretrained(base, dtype=torch.float32)
    save_pretrained(model, tmp_path / "kept", base=base)
    assert_same_tensors(all_tensors(tmp_path / "kept"), tensors)
    save_pretrained(model, tmp_path / "single", base=base, dtype=torch.float32)
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "single").values()} == {torch.float32}


def test_everything_but_weights_and_hidden_files_comes_along(tmp_path):
    base = save_released(transformers_model(CONFIGS["base"]), tmp_path / "base", shard="1GB", mtp=False)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"{{ tools }}\r\n")
    for other in ("pytorch_model.bin", "weights.gguf", ".gitattributes"):
        (base / other).write_bytes(b"large")
    save_pretrained(from_pretrained(base, dtype=torch.float32), tmp_path / "saved", base=base)
    template = tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja"
    assert template.read_bytes() == b"{{ tools }}\r\n"
    found = {path.name for path in (tmp_path / "saved").iterdir()}
    assert found == {"config.json", "model.safetensors", "additional_chat_templates", *COMPANIONS}


def test_the_index_counts_what_it_names(released, tmp_path):
    save_pretrained(from_pretrained(released, dtype=torch.float32), tmp_path / "saved", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    tensors = all_tensors(tmp_path / "saved")
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, place in index["weight_map"].items() if place == file.name} == set(opened.keys())
        assert sum(stored.end - stored.start for stored in shards.read_header(file).values()) <= 100_000


IRREGULAR = {"irregular": tiny_config(layer_types=["full_attention", *["linear_attention"] * 2, "full_attention"])}


@pytest.mark.parametrize("values", [*CONFIGS.values(), *IRREGULAR.values()], ids=[*CONFIGS, *IRREGULAR])
def test_without_a_base_the_configuration_is_written_as_released(values, tmp_path):
    config = ModelConfig.from_dict(values)
    model = HybridMoEForCausalLM(config)
    theirs = transformers_model(values)
    model.load_state_dict(theirs.state_dict())
    save_pretrained(model, tmp_path / "saved", dtype=torch.bfloat16)
    assert ModelConfig.from_folder(tmp_path / "saved") == config
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    # What transformers 4 and the GGUF converter read, at the top of the file.
    assert (written["rope_theta"], written["partial_rotary_factor"]) == (
        config.rope_theta,
        config.partial_rotary_factor,
    )
    regular = values is not IRREGULAR["irregular"]
    assert ("full_attention_interval" in written, "layer_types" in written) == (regular, not regular)
    read = Qwen3NextConfig.from_pretrained(tmp_path / "saved")
    assert read.rope_parameters == theirs.config.rope_parameters
    differing = {
        key: (value, read.to_dict()[key])
        for key, value in theirs.config.to_dict().items()
        if read.to_dict()[key] != value and key != "dtype"
    }
    assert not differing
    again, report = Qwen3NextForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_tensors(again.state_dict(), theirs.to(torch.bfloat16).state_dict())


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def place_of(folder, name):
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def test_missing_unknown_and_misshaped_tensors_are_named_together(copied):
    norm, gate = "model.layers.2.input_layernorm.weight", "model.layers.1.mlp.gate.weight"
    index = json.loads((copied / INDEX).read_text())
    edit(copied / place_of(copied, norm), lambda tensors: tensors.pop(norm))
    edit(copied / place_of(copied, gate), lambda tensors: tensors.update({gate: torch.zeros(4, 32)}))
    edit(copied / "model-mtp.safetensors", lambda tensors: tensors.update({"model.extra.bias": torch.zeros(2)}))
    index["weight_map"].pop(norm)
    index["weight_map"]["model.extra.bias"] = "model-mtp.safetensors"
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(copied, dtype=torch.float32)
    assert str(caught.value) == (
        f"{copied}: the weights do not fit config.json; 1 missing: {norm}; "
        "1 unknown: model.extra.bias (in model-mtp.safetensors); "
        f"1 of another shape: {gate} (in {place_of(copied, gate)}: [4, 32], expected [8, 32]); "
        "download the checkpoint again, or correct config.json"
    )


def test_many_missing_tensors_are_counted_and_the_first_ten_named(copied):
    values = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**values, "num_experts": 12}))
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(copied, dtype=torch.float32)
    # 4 more experts x 3 matrices x 4 layers; the routers are of another shape.
    assert "48 missing: model.layers.0.mlp.experts.8.gate_proj.weight" in str(caught.value)
    assert "and 38 more; 4 of another shape: model.layers.0.mlp.gate.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("*.safetensors*")], "found neither"),
        (lambda folder: (folder / "model-mtp.safetensors").unlink(), r"model-mtp\.safetensors: no such file"),
        (lambda folder: (folder / "model-mtp.safetensors").write_bytes(b"<html>"), "not a safetensors file"),
        (lambda folder: (folder / "model-mtp.safetensors").write_bytes(b""), "not a safetensors file"),
        (
            lambda folder: (folder / "model-mtp.safetensors").write_bytes(
                (folder / "model-mtp.safetensors").read_bytes()[:-1]
            ),
            r"model-mtp\.safetensors: \d+ bytes, but its header describes \d+",
        ),
        (
            lambda folder: edit(folder / "model-mtp.safetensors", lambda tensors: tensors.pop("mtp.norm.weight")),
            r"index\.json: names mtp\.norm\.weight \(in model-mtp\.safetensors\), which the files do not hold",
        ),
        (
            lambda folder: edit(folder / "model-mtp.safetensors", lambda tensors: tensors.update(a=torch.zeros(1))),
            r"model-mtp\.safetensors: holds a, which model\.safetensors\.index\.json does not name",
        ),
        (lambda folder: (folder / INDEX).write_text("{}"), "not an index of weights"),
        (
            lambda folder: (folder / INDEX).write_text("{"),
            r"index\.json:1:2: not JSON \(.*; an index of weights is expected",
        ),
    ],
    ids=["none", "file gone", "web page", "empty", "cut short", "tensor gone", "unnamed", "index empty", "index cut"],
)
def test_a_damaged_folder_is_one_sentence(damage, message, copied):
    damage(copied)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(copied, dtype=torch.float32)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_weight_format_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"found only pytorch_model\.bin, another format"):
        from_pretrained(tmp_path, dtype=torch.float32)


def test_saving_never_touches_a_folder_with_something_in_it(released, tmp_path):
    model = from_pretrained(released, dtype=torch.float32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="mine: already exists and is not an empty folder"):
        save_pretrained(model, tmp_path / "mine", base=released)
    beside = tmp_path / f"out{TEMPORARY}"
    beside.mkdir()
    (beside / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match=rf"out{TEMPORARY}: is in the way of writing out"):
        save_pretrained(model, tmp_path / "out", base=released)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["mine", "thesis.txt", beside.name, "thesis.txt"]


def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(released, tmp_path, monkeypatch):
    model = from_pretrained(released, dtype=torch.float32)
    written = []

    def full_disk(tensors, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_tensors", full_disk)
        with pytest.raises(CheckpointError, match=r"out: could not be written \(.*No space left on device\)"):
            save_pretrained(model, tmp_path / "out", base=released, max_shard_bytes=30_000)
    assert list(tmp_path.iterdir()) == []

    # What a killed writer leaves is replaced; an empty target is filled.
    (tmp_path / f"out{TEMPORARY}/content").mkdir(parents=True)
    (tmp_path / f"out{TEMPORARY}/being-written.lock").touch()
    (tmp_path / f"out{TEMPORARY}/content/half").touch()
    (tmp_path / "out").mkdir()
    save_pretrained(model, tmp_path / "out", base=released)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", *COMPANIONS}


def test_a_model_is_a_folder_here_or_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert resolve_model("base").resolve() == tmp_path / "base"
    assert resolve_model(str(tmp_path / "base")) == tmp_path / "base"
    assert (resolve_model("finetune/model") / "model.py").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "no such folder; point at a checkpoint folder or a hub repository"),
        ("./models/base", "no such folder; point at a checkpoint folder or a hub repository"),
        ("base", "no such folder; point at a checkpoint folder or a hub repository"),
        ("no-such-owner/no-such-model", "no such folder, and the hub does not give a repository of that name"),
        ("-bad-/..bad", "no such folder, and the hub does not give a repository of that name"),
    ],
)
def test_a_model_that_is_nowhere_is_one_sentence(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model(path)
    assert "\n" not in str(caught.value)
