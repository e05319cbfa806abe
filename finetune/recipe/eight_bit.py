"""Which state `optim.name: adamw_8bit` keeps in 8 bits, for the optimizer and for the plan. Imports no torch.

Source: arXiv 2110.02861; blocks and the smallest size are those of bitsandbytes 0.50.
"""

BLOCK = 256  # numbers that share one scale
SMALLEST = 4096  # numbers of a matrix; the state of a smaller one stays float32


def is_quantised(numbers: int, *, expert: bool) -> bool:
    """Whether the moments of a parameter of so many numbers are kept in 8 bits.

    Args:
        expert: whether it is the matrix of one expert. A block must not reach into the next expert's, since every
            expert is stored by itself.
    """
    return numbers >= SMALLEST and not (expert and numbers % BLOCK)


def scales(numbers: int) -> int:
    """Scales of one moment of so many numbers in 8 bits."""
    return -(-numbers // BLOCK)
