"""The sizes of a `qwen3_next` model, read from its released `config.json`, and how many parameters they make.

Field names are the checkpoint's own. Both spellings of the rotary settings are read: top-level `rope_theta` and
`partial_rotary_factor` (the released files) and `rope_parameters` (written by transformers 5).

Source: `Qwen3NextConfig`, transformers 5.23.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

Mixer = Literal["linear_attention", "full_attention"]
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,)}


class Recompute(NamedTuple):
    """Which halves of a layer are computed again in its backward pass, where they would keep much memory."""

    mixer: bool  # norm, DeltaNet or attention, residual sum and its norm
    experts: bool  # router, experts and shared expert, or a dense MLP


NOTHING, ALL = Recompute(False, False), Recompute(True, True)


class ConfigError(ValueError):
    """A `config.json` that this model cannot be built from: says the key, what was found and what is supported."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model. Defaults are those of `Qwen3NextConfig` where the released files omit them."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 48
    layer_types: tuple[Mixer, ...] = ()
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 0.25
    max_position_embeddings: int = 32768
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    intermediate_size: int = 5632
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types names {len(self.layer_types)} layers but num_hidden_layers is {self.num_hidden_layers}"
            )
        for name, whole, part in (
            ("num_attention_heads", self.num_attention_heads, self.num_key_value_heads),
            ("linear_num_value_heads", self.linear_num_value_heads, self.linear_num_key_heads),
        ):
            if whole % part:
                raise ConfigError(f"{name} is {whole}, which the {part} key heads do not divide")
        if not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must lie in 1..num_experts = {self.num_experts}"
            )
        if self.rotary_dim % 2:
            raise ConfigError(
                f"head_dim x partial_rotary_factor is {self.rotary_dim}; rotary pairs need an even number"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """The configuration in `folder/config.json`.

        Raises:
            ConfigError: no such file, not JSON, another model family, or a feature that this model does not have.
        """
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; point model.path at a folder that holds a checkpoint") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The configuration in the parsed contents of a `config.json`.

        Raises:
            ConfigError: another model family, a wrong type, or a feature that this model does not have.
        """
        _refuse_unsupported(values)
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        merged = {**values, **{k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}}
        merged["layer_types"] = tuple(values.get("layer_types") or _layer_types(values))
        merged["mlp_only_layers"] = tuple(values.get("mlp_only_layers") or ())
        known = {field.name: merged[field.name] for field in fields(cls) if merged.get(field.name) is not None}
        for field in fields(cls):
            expected = _SCALARS.get(str(getattr(field.type, "__name__", field.type)))
            if expected and field.name in known and type(known[field.name]) not in expected:
                raise ConfigError(f"{field.name}: expected {expected[0].__name__}, found {known[field.name]!r}")
            if expected and expected[0] is float and field.name in known:
                known[field.name] = float(known[field.name])
        return cls(**known)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each attention head that carry the rotary embedding."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` routes to experts; the others have one dense gated MLP of `intermediate_size`."""
        return (
            layer not in self.mlp_only_layers and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe(layer))

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by component, over all layers; their sum is the size of the model without `mtp.*`."""
        hidden, experts = self.hidden_size, self.num_experts
        linear = self.layer_types.count("linear_attention")
        moe = len(self.moe_layers)
        conv_dim = 2 * self.key_dim + self.value_dim
        deltanet = (
            hidden * (2 * self.key_dim + 2 * self.value_dim)
            + hidden * 2 * self.linear_num_value_heads
            + conv_dim * self.linear_conv_kernel_dim
            + 2 * self.linear_num_value_heads
            + self.linear_value_head_dim
            + self.value_dim * hidden
        )
        heads, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = hidden * (2 * heads + 2 * kv) + heads * hidden + 2 * self.head_dim
        return {
            "embeddings": self.vocab_size * hidden,
            "lm_head": 0 if self.tie_word_embeddings else self.vocab_size * hidden,
            "deltanet": linear * deltanet,
            "attention": (self.num_hidden_layers - linear) * attention,
            "experts": moe * experts * 3 * hidden * self.moe_intermediate_size,
            "router": moe * experts * hidden,
            "shared_expert": moe * (3 * hidden * self.shared_expert_intermediate_size + hidden),
            "dense_mlp": (self.num_hidden_layers - moe) * 3 * hidden * self.intermediate_size,
            "norms": (2 * self.num_hidden_layers + 1) * hidden,
        }


def _layer_types(values: dict[str, Any]) -> list[Mixer]:
    interval = values.get("full_attention_interval") or 4
    layers = values.get("num_hidden_layers") or ModelConfig.num_hidden_layers
    return ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(layers)]


def _refuse_unsupported(values: dict[str, Any]) -> None:
    family = values.get("model_type")
    if family != "qwen3_next":
        raise ConfigError(f"model_type is {family!r}; Nextune trains 'qwen3_next' (Qwen3-Next, Qwen3-Coder-Next)")
    for key, only in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("attention_dropout", 0),
        ("use_sliding_window", False),
    ):
        if values.get(key, only) not in (only, None):
            raise ConfigError(f"{key} is {values[key]!r}; only {only!r} is supported")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope type is {kind!r}; only 'default' is supported (YaRN and others change the positions)")
    unknown = set(values.get("layer_types") or ()) - {"linear_attention", "full_attention"}
    if unknown:
        raise ConfigError(f"layer_types holds {sorted(unknown)}; known: linear_attention, full_attention")
