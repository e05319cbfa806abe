"""What a `config.json` means is what transformers' own class makes of it, or it is refused with the key's name."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.utils import logging

from finetune.model.config import ModelConfig
from finetune.model.config_file import ConfigError
from tests.configs import CONFIGS, tiny_config

DELETED = "(deleted)"
ONE_TO_ONE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("shared_expert_intermediate_size", "decoder_sparse_step", "intermediate_size", "rms_norm_eps"),
    *("tie_word_embeddings", "initializer_range", "max_position_embeddings"),
)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    logging.set_verbosity_error()  # transformers warns of every unusual file


def change(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = {**copy.deepcopy(values), **changes}
    return {key: value for key, value in changed.items() if value != DELETED}


def theirs(folder: Path) -> dict[str, Any] | None:
    """What transformers reads from a folder, with the formulas of its model, or None if it fails in any way."""
    try:
        read = AutoConfig.from_pretrained(folder)
        rope = read.rope_parameters
        rotary = int(read.head_dim * rope.get("partial_rotary_factor", 1.0))
        dense = [
            layer in read.mlp_only_layers or (layer + 1) % read.decoder_sparse_step != 0
            for layer in range(read.num_hidden_layers)
        ]
        return {
            **{name: getattr(read, name) for name in ONE_TO_ONE},
            "layer_types": list(read.layer_types),
            "dense": dense,
            "rope": (rope["rope_type"], rope["rope_theta"], rotary),
            "other": (read.hidden_act, read.attention_bias, read.attention_dropout),
        }
    except Exception:
        return None


def ours(folder: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        read = ModelConfig.from_folder(folder)
    except ConfigError as error:
        return None, str(error)
    return {
        **{name: getattr(read, name) for name in ONE_TO_ONE},
        "layer_types": list(read.layer_types),
        "dense": [not read.is_moe(layer) for layer in range(read.num_hidden_layers)],
        "rope": ("default", read.rope_theta, read.rotary_dim),
        "other": ("silu", False, 0),
    }, ""


def compare(folder: Path, values: Any) -> bool:
    """Whether we serve the file; asserts that then transformers makes the same of it."""
    (folder / "config.json").write_text(json.dumps(values))
    mine, refusal = ours(folder)
    if mine is None:
        assert refusal.startswith(f"{folder}/config.json: ")
        assert "\n" not in refusal
        return False
    assert mine == theirs(folder)
    return True


NUMBERS = st.sampled_from([DELETED, None, 0, -1, 1, 2, 3, 4, 0.5, 1.0, 2.0, True, "4", 1e6, 10_000, [], {}])
KIND = st.sampled_from([DELETED, None, "default", "yarn", "linear", "dynamic", "longrope", "llama3", "default", 3])
ROPE = st.sampled_from([DELETED, DELETED, None, {}, 5]) | st.fixed_dictionaries(
    {},
    optional={
        "rope_type": KIND,
        "type": KIND,
        "rope_theta": NUMBERS,
        "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0, 1, None, 2, 0.1]),
        "factor": st.sampled_from([1.0, 4.0]),
        "full_attention": st.just({"rope_theta": 7.0}),
    },
).map(lambda rope: {key: value for key, value in rope.items() if value != DELETED})
LAYERS = st.sampled_from(
    [DELETED, None, [], ["full_attention"] * 4, ["linear_attention"] * 4, ["linear_attention", "full_attention"] * 2]
) | st.sampled_from(
    [["sliding_attention"] * 4, [["full_attention"]] * 4, ["full_attention"] * 3, "full_attention", ["x"]]
)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "rope_theta": NUMBERS,
    "partial_rotary_factor": st.sampled_from([DELETED, None, 0.5, 1.0, 0, -0.25, 2, "x"]),
    "layer_types": LAYERS,
    "full_attention_interval": NUMBERS,
    "mlp_only_layers": st.sampled_from([DELETED, None, [], [0], [0, 1, 2, 3], [9], [-1], ["0"], 0, [[0]]]),
    "decoder_sparse_step": NUMBERS,
    "tie_word_embeddings": NUMBERS,
    "norm_topk_prob": NUMBERS,
    "head_dim": st.sampled_from([DELETED, None, 12, 16, 15]),
    "hidden_act": st.sampled_from([DELETED, "silu", "gelu", None]),
    "attention_bias": NUMBERS,
    "attention_dropout": NUMBERS,
    "use_sliding_window": NUMBERS,
    "sliding_window": st.sampled_from([None, 128]),
    "rms_norm_eps": st.sampled_from([DELETED, 1e-5, 0.0, 1, None, -1e-6]),
    "initializer_range": st.sampled_from([DELETED, 0.1, 1, None]),
    "dtype": st.sampled_from([DELETED, None, "float16", "bfloat16", "int8", "auto"]),
    "num_experts": NUMBERS,
    "num_experts_per_tok": NUMBERS,
    "num_hidden_layers": st.sampled_from([DELETED, 4, 4.0, "4", 3, None, True, 0, -4]),
    "num_key_value_heads": NUMBERS,
    "vocab_size": st.sampled_from([DELETED, 96, 0, -96, "96"]),
    "per_layer_config": st.sampled_from([DELETED, None, {"0": {"num_attention_heads": 2}}]),
    "quantization_config": st.sampled_from([DELETED, None, {}, {"quant_method": "fp8"}]),
}


# Few changes to a file at a time: with many, nearly all are refused and nothing is compared.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.sets(st.sampled_from(sorted(CHANGES)), max_size=3).flatmap(
        lambda keys: st.fixed_dictionaries({key: CHANGES[key] for key in keys})
    ),
)
@example("base", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}})
@example("base", {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}})
@example("layer-types-top-1", {"rope_theta": 3.0, "partial_rotary_factor": None})
def test_any_file_means_what_transformers_makes_of_it_or_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    compare(tmp_path, change(CONFIGS[name], changes))


SERVED: list[dict[str, Any]] = [
    {},
    *({key: DELETED} for key in sorted(tiny_config()) if key not in ("model_type", "linear_num_key_heads")),
    {"rope_theta": 1e7},
    {"rope_theta": 10_000},
    {"rope_theta": DELETED, "rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}},
    {"rope_scaling": {"type": "default", "rope_theta": 3.0}, "rope_parameters": {"rope_theta": 5.0}},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "type": "yarn"}},
    {"rope_scaling": {}, "rope_parameters": None},
    {"layer_types": ["full_attention"] * 4, "full_attention_interval": 2},
    {"layer_types": None, "full_attention_interval": 1},
    {"full_attention_interval": 9},
    {"mlp_only_layers": None, "use_sliding_window": None, "sliding_window": 64},
    {"mlp_only_layers": [0, 2], "decoder_sparse_step": 2},
    {"torch_dtype": "float16", "dtype": None, "quantization_config": None, "auto_map": {"AutoTokenizer": "x.Y"}},
    {"pad_token_id": -1, "eos_token_id": [1, 2], "bos_token_id": 10**9},
]


@pytest.mark.parametrize("changes", SERVED, ids=lambda changes: ",".join(changes) or "as it is")
def test_what_is_harmless_is_served(tmp_path: Path, changes: dict[str, Any]) -> None:
    values = change(tiny_config(), changes)
    if "num_experts_per_tok" in changes:  # 10 where the file does not say
        values["num_experts"] = 16
    assert compare(tmp_path, values)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'; expected a whole number"),
    ({"num_hidden_layers": 4.0}, "num_hidden_layers is 4.0; expected a whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be at most 1000"),
    ({"num_experts": 10**9}, "num_experts is 1000000000; it must be at most 100000"),
    (
        {"num_hidden_layers": 1000, "num_experts": 2000},
        "num_hidden_layers x num_experts is 2,000,000; at most 250,000",
    ),
    ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}, "its sizes make 9,223,377,467,840,919,917 parameters"),
    ({"full_attention_interval": 0}, "full_attention_interval is 0; it must be at least 1"),
    (
        {"num_key_value_heads": 0, "hidden_size": -5},
        "hidden_size is -5; it must be at least 1; num_key_value_heads is 0;",
    ),
    (
        {"num_key_value_heads": 3, "num_experts_per_tok": 9},
        "the 3 key heads do not divide; num_experts_per_tok is 9; it",
    ),
    ({"layer_types": [["full_attention"]] * 4}, "layer_types[0] is ['full_attention']; only 'linear_attention' or"),
    ({"layer_types": []}, "layer_types names 0 layers but num_hidden_layers is 4"),
    ({"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts (see mlp_only_layers and decoder_sparse_step)"),
    ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2; it must be at most 1"),
    ({"partial_rotary_factor": 0.01}, "head_dim x partial_rotary_factor is 0; rotary pairs need an even number"),
    ({"partial_rotary_factor": None}, "partial_rotary_factor is null; expected a number"),
    ({"rope_theta": "x"}, "rope_theta is 'x'; expected a number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf; expected a finite number"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type is 'yarn'; only 'default' is supported"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type is 'dynamic'; only 'default' is"),
    ({"rope_parameters": {"full_attention": {}}}, "rope_parameters is given by layer type (full_attention)"),
    ({"rope_parameters": [1]}, "rope_parameters is [1]; expected an object"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
    ({"attention_bias": True}, "attention_bias is true; only false is supported"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1; it must be at most 0"),
    ({"use_sliding_window": True}, "use_sliding_window is true; only false is supported"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
    (
        {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config says that the weights are quantised (fp8), and",
    ),
    ({"quantization_config": 4}, "quantization_config says that the weights are quantised (4)"),
    ({"quantization_config": []}, "quantization_config is []; expected an object"),
    ({"compression_config": False}, "compression_config is false; expected an object"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; only 'float32', 'bfloat16', 'float16' or"),
    ({"dtype": 16}, "dtype is 16; only 'float32'"),
    ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, "auto_map names code of its own for the model (AutoModelFor"),
    ({"auto_map": ["own.Model"]}, "auto_map is ['own.Model']; expected an object"),
    ({"per_layer_config": {"0": {"num_experts": 2}}}, "layers with settings of their own are not supported"),
    ({"pad_token_id": 96}, "pad_token_id is 96, but the embedding has 96 rows (vocab_size)"),
    ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; Nextune trains 'qwen3_next'"),
    ({"model_type": ["qwen3_next"]}, "model_type is ['qwen3_next']; Nextune trains 'qwen3_next'"),
    ({"model_type": DELETED}, "model_type is null; Nextune trains 'qwen3_next'"),
    ({"vocab_size": "9" * 500}, "vocab_size is '99999999"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_refused_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(change(tiny_config(), changes)))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}/config.json: ")
    assert message in told
    assert "\n" not in told
    assert len(told) < 400


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"[1]", "config.json: holds a list where an object is expected"),
        (b"7", "config.json: holds a number where an object is expected"),
        (b"{", "config.json:1:2: not JSON"),
        (b'{"model_type": "\xff"}', "config.json:1: not UTF-8"),
        (b'{"a":' * 100_000, "config.json: nested more than 100 deep"),
        (b'{"model_type": "qwen3_next", "hidden_size": ' + b"1" * 5000 + b"}", "holds a number of 5,000 digits"),
    ],
)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert message in str(caught.value)


def test_a_config_that_is_no_regular_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file; point model\.path at a folder"):
        ModelConfig.from_folder(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: is a FIFO, not a regular file; copy the file"):
        ModelConfig.from_folder(tmp_path)
