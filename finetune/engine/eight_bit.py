"""AdamW of bitsandbytes, whose moments are 8-bit codes with a float32 scale for every 256 numbers.

The codes and scales themselves are what checkpoints hold, so a resumed run goes on from the same numbers, bit for bit.
The library is an extra and takes seconds to import, so it is imported where it is used.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.recipe.eight_bit import is_quantised, scales
from finetune.recipe.sections import Optim

if TYPE_CHECKING:
    from bitsandbytes.optim import AdamW8bit

SCALES = ("absmax1", "absmax2")  # of the codes in state1 and state2
TABLES = ("qmap1", "qmap2")  # the value of each code, the same for every parameter


def adamw_8bit(groups: list[dict[str, object]], optim: Optim) -> "AdamW8bit":
    """The optimizer over these groups."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def initial_codes(optimizer: "AdamW8bit", like: Tensor, experts: int) -> dict[str, Any]:
    """The state of a tensor before its first step, as the library's `init_state` makes it.

    It would decide by the size of all experts of this rank together, so that another expert parallel size gave another
    form of state; here each expert's own matrix decides.

    Args:
        experts: how many are stacked in `like`; 0 if it is no expert's.
    """
    numbers = like.numel() // (experts or 1)
    if not is_quantised(numbers, expert=experts > 0):
        return {"step": 0, "state1": torch.zeros_like(like), "state2": torch.zeros_like(like)}
    count = (experts or 1) * scales(numbers)
    state: dict[str, Any] = {"step": 0}
    for number, kind in ((1, "dynamic"), (2, "udynamic")):
        optimizer.name2qmap[kind] = optimizer.name2qmap[kind].to(like.device)
        state |= {
            f"state{number}": torch.zeros_like(like, dtype=torch.uint8),
            f"qmap{number}": optimizer.name2qmap[kind],
            f"absmax{number}": torch.zeros(count, device=like.device),
        }
    return state
