"""The sizes of a `qwen3_next` model, read from its released `config.json`, and the parameter counts they imply.

Field names are those of the checkpoint. Both spellings of the rotary settings are read: top-level `rope_theta` and
`partial_rotary_factor` (the released files) and `rope_parameters` (written by transformers 5).

`config_file.py` reads the file. Source: `Qwen3NextConfig`, transformers 5.24.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from finetune.model.config_file import LAYERS, VOCABULARY, ConfigError, Mixer, settings_of
from monitoring.json_file import FileError, MissingFileError, read_json

_MOST_FILE_BYTES = 16 << 20
_MOST_PARAMETERS = 10**14  # more than any tensor library can count in one tensor of a layer
_MOST_EXPERTS = 250_000  # over all layers; the released model has 24,576


class Recompute(NamedTuple):
    """Which halves of a layer are recomputed in the backward pass instead of storing their activations."""

    mixer: bool  # norm, DeltaNet or attention, residual sum and its norm
    experts: bool  # router, experts and shared expert, or a dense MLP


NOTHING, ALL = Recompute(False, False), Recompute(True, True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model. Defaults are those of `Qwen3NextConfig`.

    Raises:
        ConfigError: the sizes contradict each other.
    """

    vocab_size: int = VOCABULARY
    hidden_size: int = 2048
    num_hidden_layers: int = LAYERS
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
        problems = self._problems()
        if problems:
            raise ConfigError("; ".join(problems))

    def _problems(self) -> list[str]:
        """Contradictions between sizes that are each valid alone, one sentence each."""
        problems = []
        if len(self.layer_types) != self.num_hidden_layers:
            problems.append(
                f"layer_types names {len(self.layer_types)} layers but num_hidden_layers is {self.num_hidden_layers}"
            )
        for name, whole, part in (
            ("num_attention_heads", self.num_attention_heads, self.num_key_value_heads),
            ("linear_num_value_heads", self.linear_num_value_heads, self.linear_num_key_heads),
        ):
            if whole % part:
                problems.append(f"{name} is {whole}, which the {part} key heads do not divide")
        if self.num_experts_per_tok > self.num_experts:
            problems.append(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must lie in 1..num_experts = {self.num_experts}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            problems.append(
                f"head_dim x partial_rotary_factor is {self.rotary_dim}; rotary pairs need an even number of at least 2"
            )
        if self.num_hidden_layers * self.num_experts > _MOST_EXPERTS:
            problems.append(
                f"num_hidden_layers x num_experts is {self.num_hidden_layers * self.num_experts:,}; at most"
                f" {_MOST_EXPERTS:,} experts are supported"
            )
        if not problems and (parameters := sum(self.parameter_counts().values())) > _MOST_PARAMETERS:
            problems.append(f"its sizes make {parameters:,} parameters; at most {_MOST_PARAMETERS:,} are supported")
        return problems

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read the configuration in `folder/config.json`.

        Raises:
            ConfigError: no such file, not JSON, another model family, an unsupported feature, or no layer with experts.
        """
        folder = Path(folder)
        path = folder / "config.json"
        try:
            values = read_json(path, _MOST_FILE_BYTES)
        except MissingFileError:
            raise ConfigError(f"{path}: no such file; point model.path at a folder that holds a checkpoint") from None
        except FileError as error:
            raise ConfigError(f"{error}; copy the file of the checkpoint again") from None
        try:
            config = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if not config.moe_layers:
            raise ConfigError(
                f"{path}: no layer has experts (see mlp_only_layers and decoder_sparse_step), and Nextune trains"
                " mixtures of experts"
            )
        return config

    @classmethod
    def from_dict(cls, values: Any) -> "ModelConfig":
        """Build the configuration from the parsed contents of a `config.json`.

        Raises:
            ConfigError: another model family, a wrong type, or an unsupported feature.
        """
        settings = settings_of(values)
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

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
        """Whether `layer` has routed experts. The other layers have a dense gated MLP of `intermediate_size`."""
        return (
            layer not in self.mlp_only_layers and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe(layer))

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each component, over all layers. Their sum is the model without `mtp.*`."""
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
