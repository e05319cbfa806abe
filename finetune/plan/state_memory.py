"""Memory of weights, masters, moments and gradients on one rank, and the offloaded part. Imports no torch."""

from finetune.model.config import ModelConfig
from finetune.plan import optimizer_state
from finetune.plan.activations import FLOAT32
from finetune.plan.workload import Workload

_LABELS = {
    "adamw": "AdamW moments",
    "adam": "Adam moments",
    "sgd": "momentum",
    "adamw_8bit": "AdamW moments in 8 bits",
    "adafactor": "Adafactor sums of rows and columns",
}
STORED_BYTES = 2  # a released checkpoint is bfloat16
REDUCE_BUCKET = 100_000_000  # elements; copy of the constant in `engine.py`, whose import needs torch


def on_rank(work: Workload) -> dict[str, int]:
    """Bytes of weights, masters, optimizer state and gradients on one rank. Exact except padding of partitions."""
    parallel, config = work.recipe.parallel, work.config
    local = work.trained_dense + work.trained_experts // parallel.expert
    # The decay rates of DeltaNet are float32 whatever the weights are.
    rates = 2 * config.linear_num_value_heads * config.layer_types.count("linear_attention")
    bytes_of = {
        "weights, all but experts": work.weight_bytes * (work.dense - rates) + FLOAT32 * rates,
        "weights, experts": work.weight_bytes * work.experts // parallel.expert,
        "adapters": work.weight_bytes * (work.dense_adapters + work.expert_adapters // parallel.expert),
    }
    collected = work.shard if parallel.zero_stage == 2 else local
    gradients = FLOAT32 * (collected + min(local, REDUCE_BUCKET))
    if parallel.offload == "none":
        own = rates * (work.recipe.lora is None) if work.weight_bytes < FLOAT32 else work.shard
        copies = work.shard - own if parallel.zero_stage == 0 else work.shard  # stage 0: float32 is its own master
        return bytes_of | {
            "float32 copies of what trains": FLOAT32 * copies,
            _LABELS[work.recipe.optim.name]: optimizer_state.state_bytes(work, work.shard, expert=parallel.expert),
            "gradients": gradients,
        }
    on_host = offloaded(work) if work.machine.device_bytes is None else 0
    # Gradients are copied to the host through a buffer of the size of the largest parameter.
    return bytes_of | {
        "gradients": gradients + work.weight_bytes * _largest_trained(work),
        "offloaded optimizer state": on_host,
    }


def offloaded(work: Workload) -> int:
    """Host bytes of one rank for offload: gradients, rounded weights, and the optimizer state unless it is on disk.

    The page cache of a state on disk is not counted, because the kernel can reclaim it.
    """
    offload = work.recipe.parallel.offload
    if offload == "none":
        return 0
    kept = FLOAT32 * (1 + optimizer_state.moments(work.recipe.optim))
    return work.shard * (FLOAT32 + work.weight_bytes + (kept if offload == "cpu" else 0))


def _largest_trained(work: Workload) -> int:
    """Elements of the largest trainable parameter of one rank."""
    config, lora = work.config, work.recipe.lora
    local_experts = config.num_experts // work.recipe.parallel.expert * bool(config.moe_layers)
    if lora is None:
        stacked = local_experts * 2 * config.moe_intermediate_size
        return config.hidden_size * max(config.vocab_size, 2 * config.key_dim + 2 * config.value_dim, stacked)
    on_experts = local_experts * max(config.hidden_size, 2 * config.moe_intermediate_size) * ("experts" in lora.targets)
    on_linear = max(config.hidden_size, 2 * config.key_dim + 2 * config.value_dim)
    router = config.num_experts * config.hidden_size * work.recipe.router.train
    return max(lora.rank * max(on_experts, on_linear), router)


def largest_stored(config: ModelConfig) -> int:
    """Bytes of the largest tensor of a released checkpoint, whose experts are stored one by one."""
    largest = max(config.vocab_size, 2 * config.key_dim + 2 * config.value_dim, config.intermediate_size)
    return STORED_BYTES * config.hidden_size * largest
