"""Mapping between the tensors stored in a released checkpoint and the parameters of our model; reads no files.

A stored tensor is either a whole parameter or, for the routed experts, one matrix of one expert: `gate_proj` is the
first half of the rows of that expert in our `gate_up_proj`, `up_proj` the second half. Checkpoints that already store
the experts stacked ("fused") are recognised by their tensor names. `mtp.*` (the multi-token-prediction module of some
releases) is not part of the model: it is copied unchanged to every checkpoint written from this one.

Source: the released Qwen3-Next repositories; `conversion_mapping.py` ("qwen3_next"), transformers 5.23.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from finetune.model.config import ModelConfig

if TYPE_CHECKING:  # run folders are read without torch
    from torch import Tensor

Shape = tuple[int, ...]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or exported; the message names file or tensor, finding and remedy."""


class Slot(NamedTuple):
    """The position of one stored tensor in our parameters."""

    parameter: str
    shape: Shape  # as stored
    expert: int | None = None  # global id; None: not a routed expert, or all of them stacked
    rows: slice | None = None  # rows of that expert; None: all of them

    @property
    def fused(self) -> bool:
        """Whether the stored tensor holds all routed experts of a layer."""
        return self.expert is None and is_expert_parameter(self.parameter)

    def of(self, parameter: "Tensor", first_expert: int = 0) -> "Tensor":
        """View of the part of `parameter` that corresponds to the stored tensor.

        Args:
            first_expert: global id of the first expert in `parameter`.
        """
        part = parameter if self.expert is None else parameter[self.expert - first_expert]
        return part if self.rows is None else part[self.rows]


def is_expert_parameter(name: str) -> bool:
    """Whether the parameter stacks the routed experts, which expert parallelism partitions."""
    return ".mlp.experts." in name


def is_carried(stored: str) -> bool:
    """Whether a stored tensor is not loaded but copied to every checkpoint written from this one."""
    return stored.startswith("mtp.")


def is_fused(stored: Iterable[str]) -> bool:
    """Whether the experts are stored stacked, as in transformers' modules, instead of one by one."""
    return any(name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")) for name in stored)


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every parameter of the whole model (all experts), in layer order.

    `lm_head.weight` is absent when the embeddings are tied.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": vocabulary}
    for layer, mixer in enumerate(config.layer_types):
        block = {
            "input_layernorm.weight": (config.hidden_size,),
            **(_deltanet(config) if mixer == "linear_attention" else _attention(config)),
            "post_attention_layernorm.weight": (config.hidden_size,),
            **(_moe(config) if config.is_moe(layer) else _mlp("mlp", config.hidden_size, config.intermediate_size)),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def stored_tensors(config: ModelConfig, *, fused: bool = False) -> dict[str, Slot]:
    """Every tensor of a checkpoint of this model except `mtp.*`, with its position in our parameters.

    Args:
        fused: whether the experts are stacked (False: one by one, as released).
    """
    slots: dict[str, Slot] = {}
    for name, shape in parameter_shapes(config).items():
        if not is_expert_parameter(name) or fused:
            slots[name] = Slot(name, shape)
            continue
        prefix, matrix = name.rsplit(".", 1)
        count, rows, columns = shape
        halves = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
        parts: dict[str, slice | None] = {**halves} if matrix == "gate_up_proj" else {matrix: None}
        for expert in range(count):
            for part, taken in parts.items():
                part_shape = (rows // len(parts), columns)
                slots[f"{prefix}.{expert}.{part}.weight"] = Slot(name, part_shape, expert, taken)
    return slots


def _deltanet(config: ModelConfig) -> dict[str, Shape]:
    hidden, key, value, heads = config.hidden_size, config.key_dim, config.value_dim, config.linear_num_value_heads
    return {
        "linear_attn.in_proj_qkvz.weight": (2 * key + 2 * value, hidden),
        "linear_attn.in_proj_ba.weight": (2 * heads, hidden),
        "linear_attn.conv1d.weight": (2 * key + value, 1, config.linear_conv_kernel_dim),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (config.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, value),
    }


def _attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, head = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "self_attn.q_proj.weight": (2 * query, hidden),  # per head: query rows, then output-gate rows
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }


def _moe(config: ModelConfig) -> dict[str, Shape]:
    hidden, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
    return {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
        **_mlp("mlp.shared_expert", hidden, config.shared_expert_intermediate_size),
        "mlp.shared_expert_gate.weight": (1, hidden),
    }


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
