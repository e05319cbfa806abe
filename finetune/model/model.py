"""The hybrid mixture-of-experts causal language model: embedding, blocks, head, recompute and initialisation.

Parameter names are those of transformers' `Qwen3NextForCausalLM` in memory, so
`ours.load_state_dict(theirs.state_dict())` is the whole conversion. `finetune/checkpoint/weights.py` reads and writes
checkpoint folders.

Source: `Qwen3NextForCausalLM`, transformers 5.23.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from finetune.model.attention import (
    PRODUCTS,
    GatedAttention,
    Isolate,
    Isolation,
    Packing,
    document_mask,
    has_several_documents,
)
from finetune.model.config import ALL, NOTHING, ModelConfig, Recompute
from finetune.model.deltanet import DECAY_RATES, GatedDeltaNet
from finetune.model.head import IGNORED, token_loss_sum
from finetune.model.layers import MLP, RMSNorm, positions_in_segments, residual_norm, rotary_table
from finetune.model.moe import MoE, Routing

PADDING = -1  # segment id of a position that holds no token


class Output(NamedTuple):
    """Result of a forward pass: `logits` without labels, `loss_sum` and `token_count` with labels."""

    logits: Float[Tensor, "batch time vocabulary"] | None
    loss_sum: Float[Tensor, ""] | None  # float32, over supervised tokens
    token_count: Int[Tensor, ""] | None  # number of supervised tokens
    routings: dict[int, Routing]  # by layer; layers with a dense MLP are absent


class Layout(NamedTuple):
    """Properties of the batch that every layer needs, computed once per forward pass."""

    segment_ids: Int[Tensor, "batch time"]
    cos: Float[Tensor, "batch time rotary"]
    sin: Float[Tensor, "batch time rotary"]
    isolation: Isolation | None  # attention mask or document boundaries; None: one document a sequence
    tokens: Int[Tensor, " tokens"] | None  # flat positions that hold a token; None: all of them


class Block(nn.Module):
    """x + mixer(norm x), then x + experts(norm x); `add_and_norm` is `residual_norm` or an equivalent kernel.

    Either half may be recomputed in the backward pass instead of storing its activations. The output of the attention
    operator is stored in any case.
    """

    def __init__(self, config: ModelConfig, layer: int, local_experts: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.layer_types[layer] == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.add_and_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = residual_norm
        self.is_linear = config.layer_types[layer] == "linear_attention"
        self.recompute = NOTHING
        self.mlp = (
            MoE(config, local_experts) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self, x: Float[Tensor, "batch time hidden"], layout: Layout
    ) -> tuple[Float[Tensor, "batch time hidden"], Routing | None]:
        again = self.recompute if torch.is_grad_enabled() else NOTHING
        if all(again):  # as one function, so that only the layer's input is stored
            x, out, routing = self._again(self._halves, x, layout, NOTHING)
        else:
            x, out, routing = self._halves(x, layout, again)
        if layout.tokens is not None and routing is not None:
            out = torch.zeros_like(x).flatten(0, 1).index_put((layout.tokens,), out).view_as(x)
        # Outside of the recomputed function: the sum needs no stored tensor, so recompute can stop before the experts'
        # last product.
        return x + out, routing

    def _halves(self, x: Tensor, layout: Layout, again: Recompute) -> tuple[Tensor, Tensor, Routing | None]:
        """The residual stream after the mixer, the output of the experts or the MLP, and the routing."""
        feed = partial(self._again, self._feed, attends=False) if again.experts else self._feed
        x, normed = self._again(self._mix, x, layout) if again.mixer else self._mix(x, layout)
        out, routing = feed(normed, layout)
        return x, out, routing

    def _again(self, function: Callable[..., Any], *inputs: Any, attends: bool = True) -> Any:
        """Checkpoint `function`: store its inputs and the output of attention, recompute the rest."""
        attends = attends and not self.is_linear
        kept = partial(create_selective_checkpoint_contexts, PRODUCTS) if attends else noop_context_fn
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=kept, preserve_rng_state=draws)

    def _mix(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """x + mixer(norm x), and the norm of that sum."""
        normed = self.input_layernorm(x)
        if self.is_linear:
            mixed = self.linear_attn(normed, layout.segment_ids)
        else:
            mixed = self.self_attn(normed, layout.cos, layout.sin, layout.isolation)
        norm = self.post_attention_layernorm
        return self.add_and_norm(x, mixed, norm.weight, norm.eps)

    def _feed(self, normed: Tensor, layout: Layout) -> tuple[Tensor, Routing | None]:
        """Output of the MLP for every position, or of the experts for the positions that hold a token."""
        if isinstance(self.mlp, MLP):
            return self.mlp(normed), None
        if layout.tokens is None:
            out, routing = self.mlp(normed.flatten(0, 1))
            return out.view_as(normed), routing
        out, routing = self.mlp(normed.flatten(0, 1)[layout.tokens])
        return out, routing


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, local_experts: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, local_experts) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]


class HybridMoEForCausalLM(nn.Module):
    """Qwen3-Next: DeltaNet and attention mixers, routed experts or a dense MLP, a language-model head.

    Args:
        experts: ids of the experts that this rank holds, a contiguous range; all of them by default.
    """

    def __init__(self, config: ModelConfig, experts: range | None = None):
        super().__init__()
        self.settings = config  # not `config`: peft would treat the model as one of transformers
        self.local_experts = experts if experts is not None else range(config.num_experts)
        self.keep_router_logits = True  # input of the router losses
        self.loss = token_loss_sum  # the definition, or an equivalent kernel
        self.isolate: Isolate = document_mask  # makes the `isolation` of `GatedAttention.attend_packed`
        self.model = Decoder(config, len(self.local_experts))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        segment_ids: Int[Tensor, "batch time"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
    ) -> Output:
        """Compute logits, or with labels the summed loss; and the routing of every layer.

        Args:
            segment_ids: document of each position, contiguous; -1 is padding, which is never routed. Documents are
                isolated in attention, convolution and recurrent state. By default each sequence is one document.
            position_ids: position in the document; derived from the segment ids by default.
            labels: the token that each position must predict (already shifted), or -100.
        """
        x, routings, supervised = self._decode(input_ids, segment_ids, position_ids, labels)
        if labels is None:
            return Output(self.lm_head(x), None, None, routings)
        loss_sum, token_count = self.loss(x, self.lm_head.weight, labels, supervised)
        return Output(None, loss_sum, token_count, routings)

    @property
    def recompute(self) -> tuple[Recompute, ...]:
        """The recomputed halves of every layer; may also be set to True (all) or False (none)."""
        return tuple(block.recompute for block in self.model.blocks)

    @recompute.setter
    def recompute(self, layers: Sequence[Recompute] | bool) -> None:
        if isinstance(layers, bool):
            layers = [ALL if layers else NOTHING] * len(self.model.layers)
        for block, again in zip(self.model.blocks, layers, strict=True):
            block.recompute = again

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the parameters to `dtype` in place, with the exceptions of `parameter_dtype`."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, dtype))

    def route(self, input_ids: Int[Tensor, "batch time"], segment_ids: Int[Tensor, "batch time"]) -> dict[int, Routing]:
        """The routing of every MoE layer, as `forward` returns it, without computing logits."""
        return self._decode(input_ids, segment_ids, None, None)[1]

    def tie(self) -> None:
        """Tie the head to the embedding if the configuration says so. Repeat it after either weight is replaced."""
        if self.settings.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _decode(
        self, input_ids: Tensor, segment_ids: Tensor | None, position_ids: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, dict[int, Routing], int]:
        """Hidden states, the routing of every MoE layer, and the number of supervised tokens."""
        x = self.model.embed_tokens(input_ids)
        layout, supervised = self._layout(x, segment_ids, position_ids, labels)
        routings = {}
        for layer, block in enumerate(self.model.layers):
            x, routing = block(x, layout)
            if routing is not None:
                routings[layer] = routing if self.keep_router_logits else routing._replace(logits=None)
        return self.model.norm(x), routings, supervised

    def _layout(
        self, x: Tensor, segment_ids: Tensor | None, position_ids: Tensor | None, labels: Tensor | None
    ) -> tuple[Layout, int]:
        given = segment_ids
        if segment_ids is None:
            segment_ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        positions = positions_in_segments(segment_ids)
        turns = positions if position_ids is None else position_ids
        cos, sin = rotary_table(turns, self.settings.rotary_dim, self.settings.rope_theta, x.dtype)
        if given is None and labels is None:  # no padding, no labels: nothing to synchronise for
            return Layout(segment_ids, cos, sin, None, None), 0
        is_token = segment_ids.flatten() != PADDING
        several = has_several_documents(segment_ids, PADDING)
        labelled = x.new_zeros((), dtype=torch.long) if labels is None else (labels != IGNORED).sum()
        facts = several, is_token.sum(), (positions == 0).sum(), positions.max() + 1, labelled
        # The only host synchronisation of the layout, after all work that does not depend on it has been launched.
        packed, count, documents, longest, supervised = torch.stack(facts).tolist()
        isolation = self.isolate(Packing(segment_ids, documents, longest)) if packed else None
        tokens = torch.nonzero_static(is_token, size=count).squeeze(-1) if count < len(is_token) else None
        return Layout(segment_ids, cos, sin, isolation, tokens), supervised


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a parameter in a model of dtype `dtype`: `DECAY_RATES` of DeltaNet are always float32."""
    return torch.float32 if name.endswith(DECAY_RATES) else dtype


def initialise(model: HybridMoEForCausalLM, seed: int) -> None:
    """Initialise every parameter for training from scratch; the values do not depend on the expert parallel size.

    Matrices are normal with standard deviation `initializer_range`, norms are the identity, dt_bias is 1, A_log is the
    log of a uniform draw from (0.01, 16). Every tensor, and every expert of a stacked one, has its own generator.

    Source: `Qwen3NextPreTrainedModel._init_weights`, transformers 5.23.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            for place, expert in enumerate(model.local_experts):
                _fill(f"{name}[{expert}]", parameter.data[place], model.settings.initializer_range, seed)
        else:
            _fill(name, parameter.data, model.settings.initializer_range, seed)


def _fill(name: str, value: Tensor, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    if name.endswith("A_log"):
        drawn = torch.empty(value.shape).uniform_(0.01, 16, generator=generator).log()
    elif name.endswith("dt_bias") or name.endswith("linear_attn.norm.weight"):
        drawn = torch.ones(value.shape)
    elif value.ndim == 1:
        drawn = torch.zeros(value.shape)
    else:
        drawn = torch.empty(value.shape).normal_(std=std, generator=generator)
    value.copy_(drawn)
