"""Parsing and validation of a released `config.json`, with the defaults of transformers' config class.

A key that changes the model is interpreted as `Qwen3NextConfig` does, or refused by name. A key without effect in this
model family is ignored, as in transformers.

Source: `Qwen3NextConfig`, `PreTrainedConfig` and `RotaryEmbeddingConfigMixin`, transformers 5.24.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from monitoring.json_file import kind_of

Mixer = Literal["linear_attention", "full_attention"]

LAYERS, VOCABULARY = 48, 151936  # defaults

_MOST_LAYERS = 1_000
_MOST_EXPERTS = 100_000
_MOST_SHOWN = 60  # characters of a value in a message


class ConfigError(ValueError):
    """A `config.json` that this model cannot be built from; the message has key, value and what is supported."""


def _absent(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("unsupported", "layers with settings of their own are not supported")
    return value


def _false(value: bool | None) -> bool | None:
    if value:
        raise PydanticCustomError("unsupported", "only false is supported")
    return value


def _not_quantised(value: Any) -> Any:
    if value:
        method = value.get("quant_method", "unknown") if isinstance(value, dict) else value
        raise PydanticCustomError(
            "quantised",
            "says that the weights are quantised ({method}), and scales are not read; use the checkpoint in bfloat16,"
            " float16 or float32",
            {"method": str(method)[:_MOST_SHOWN]},
        )
    if value is not None and not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "")
    return value


def _no_own_code(value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "")
    own = sorted(str(key) for key in value or {} if str(key).startswith(("AutoConfig", "AutoModel")))
    if own:
        raise PydanticCustomError(
            "own_code",
            "names code of its own for the model ({own}); only the model of transformers is trained, so remove the key"
            " if the weights belong to that",
            {"own": ", ".join(own)[:_MOST_SHOWN]},
        )
    return value


def _real(value: Any) -> Any:
    if type(value) is int:  # transformers refuses to load such a file
        raise PydanticCustomError("unsupported", "expected a number with a decimal point")
    return value


_STRICT = ConfigDict(strict=True, allow_inf_nan=False)

Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Real = Annotated[float, BeforeValidator(_real)]
Stored = Literal["float32", "bfloat16", "float16", "float64"]


@with_config(_STRICT)
class _Keys(TypedDict, total=False):
    """Every key of a `config.json` that this model depends on. The defaults are in `ModelConfig`."""

    model_type: Required[Literal["qwen3_next"]]
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
    layer_types: list[Mixer] | None
    full_attention_interval: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size
    linear_num_key_heads: Size
    linear_num_value_heads: Size
    linear_key_head_dim: Size
    linear_value_head_dim: Size
    linear_conv_kernel_dim: Size
    num_experts: Annotated[int, Field(ge=1, le=_MOST_EXPERTS)]
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Size
    norm_topk_prob: bool
    decoder_sparse_step: Size
    mlp_only_layers: list[int] | None
    intermediate_size: Size
    rms_norm_eps: Annotated[Real, Field(gt=0, lt=1)]
    tie_word_embeddings: bool
    initializer_range: Annotated[Real, Field(ge=0)]
    pad_token_id: int | None
    # Only one value is supported.
    hidden_act: Literal["silu"]
    attention_bias: Annotated[bool, AfterValidator(_false)]
    attention_dropout: Annotated[float, Field(ge=0, le=0)]
    use_sliding_window: Annotated[bool | None, AfterValidator(_false)]
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    dtype: Stored | None
    torch_dtype: Stored | None
    quantization_config: Annotated[Any, BeforeValidator(_not_quantised)]
    compression_config: Annotated[Any, BeforeValidator(_not_quantised)]
    auto_map: Annotated[Any, BeforeValidator(_no_own_code)]
    per_layer_config: Annotated[Any, BeforeValidator(_absent)]


@with_config(_STRICT)
class _Rope(TypedDict):
    """The effective rotary settings, from any of their places in the file."""

    rope_type: Literal["default"]
    rope_theta: Annotated[float, Field(gt=0)]
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)]


_validate_keys = TypeAdapter(_Keys).validate_python
_validate_rope = TypeAdapter(_Rope).validate_python


def settings_of(values: Any) -> dict[str, Any]:
    """Validate the parsed contents of a `config.json`.

    Returns:
        Values by key, including every field of `ModelConfig` that the file sets.

    Raises:
        ConfigError: another model family, a wrong type or size, or an unsupported feature; the one-line message names
            every such key.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"holds {kind_of(values)} where an object is expected")
    family = values.get("model_type")
    if family != "qwen3_next":
        raise ConfigError(f"model_type is {_shown(family)}; Nextune trains 'qwen3_next' (Qwen3-Next, Qwen3-Coder-Next)")
    rope, places = _rope(values)
    problems = _problems(_validate_keys, values, {})
    if "rope_parameters" not in problems and "rope_scaling" not in problems:
        problems |= _problems(_validate_rope, rope, places)
    if problems:
        raise ConfigError("; ".join(problems.values()))
    padding, rows = values.get("pad_token_id"), values.get("vocab_size", VOCABULARY)
    if padding is not None and not -rows <= padding < rows:
        raise ConfigError(f"pad_token_id is {padding}, but the embedding has {rows:,} rows (vocab_size)")
    settings = {**values, **rope}
    settings |= {name: float(rope[name]) for name in ("rope_theta", "partial_rotary_factor")}
    settings["layer_types"] = tuple(_layer_types(values))
    settings["mlp_only_layers"] = tuple(values.get("mlp_only_layers") or ())
    return settings


def _layer_types(values: Mapping[str, Any]) -> list[Mixer]:
    if values.get("layer_types") is not None:
        return values["layer_types"]
    interval, layers = values.get("full_attention_interval", 4), values.get("num_hidden_layers", LAYERS)
    return ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(layers)]


def _rope(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The effective rotary settings, and the key that each comes from.

    As in transformers: a non-empty `rope_scaling` replaces `rope_parameters`. A setting absent there is read from the
    top level of the file; otherwise it has the default of the family.
    """
    section = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    inner = values.get(section)
    inner = inner if isinstance(inner, dict) else {}
    by_layer = sorted(set(inner) & {"linear_attention", "full_attention"})
    if by_layer:
        raise ConfigError(f"{section} is given by layer type ({', '.join(by_layer)}); one for all layers is supported")
    kind = "rope_type" if "rope_type" in inner or "type" not in inner else "type"
    rope, places = {"rope_type": inner.get(kind, "default")}, {"rope_type": f"{section}.{kind}"}
    for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", 0.25)):
        rope[key] = inner.get(key, values.get(key, default))
        places[key] = f"{section}.{key}" if key in inner else key
    return rope, places


def _problems(
    validate: Callable[[dict[str, Any]], Any], values: Mapping[str, Any], places: Mapping[str, str]
) -> dict[str, str]:
    """Validation errors as sentences, by key; the first error of each key.

    Args:
        places: where the file has a key, for the message; by default its own name.
    """
    try:
        validate(dict(values))
    except ValidationError as error:
        found: dict[str, str] = {}
        for one in error.errors(include_url=False):
            key = str(one["loc"][0])
            inside = "".join(f"[{part}]" for part in one["loc"][1:] if isinstance(part, int))
            found.setdefault(key, f"{places.get(key, key)}{inside} {_in_words(one)}")
        return found
    return {}


_EXPECTED = {
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "list_type": "expected a list",
    "dict_type": "expected an object",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be above {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be below {lt}",
    "literal_error": "only {expected} is supported",
}


def _in_words(error: ErrorDetails) -> str:
    if error["type"] in ("quantised", "own_code"):
        return error["msg"]
    expected = error["msg"]
    if error["type"] in _EXPECTED:
        expected = _EXPECTED[error["type"]].format(**error.get("ctx", {}))
    return f"is {_shown(error['input'])}; {expected}"


def _shown(value: Any) -> str:
    text = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
