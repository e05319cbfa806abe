"""Limits of an exported adapter; reported by `plan`, at the start of a run and at export."""

from collections.abc import Collection


def adapter_limits(targets: Collection[str], *, trains_routers: bool) -> list[str]:
    """One sentence for each limit of the adapter that a LoRA run with these targets trains; usually none.

    Args:
        targets: values of `lora.targets`.
        trains_routers: `router.train` of the recipe.
    """
    sentences = []
    if trains_routers:
        sentences.append(
            "router.train: an adapter cannot hold trained routers; this run can be exported as a merged model only"
            " (export --format merged)"
        )
    if "shared_expert" in targets or "all-linear" in targets:
        named = "shared_expert" if "shared_expert" in targets else "all-linear includes shared_expert, which"
        sentences.append(
            f"lora.targets: {named} has no peft form for this model: peft would load its factors on the"
            " routed experts; this run can be exported as a merged model only (export --format merged)"
        )
    elif "experts" in targets:
        sentences.append(
            "lora.targets: peft loads adapters of the routed experts, but not every server does; a merged model is"
            " loaded by all of them (docs/serving.md)"
        )
    return sentences
