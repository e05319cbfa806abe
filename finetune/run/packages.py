"""Packages that only some recipes need, looked for before anything is loaded."""

import sys
from importlib.metadata import PackageNotFoundError, version

from finetune.recipe.recipe import Recipe, RecipeError

_FIRST = (0, 50)  # version of bitsandbytes that steps on a CPU too


def check_packages(recipe: Recipe) -> None:
    """Make sure that what this recipe needs is installed here.

    Raises:
        RecipeError: it is not; says how to install it.
    """
    if recipe.optim.name != "adamw_8bit":
        return
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        found = ""
    if tuple(int(part) for part in found.split(".")[:2] if part.isdecimal()) < _FIRST:
        state = f"is version {found} here" if found else "is not installed"
        raise RecipeError(
            f"optim.name: adamw_8bit needs the package bitsandbytes, which {state}; install it with"
            f" `{sys.executable} -m pip install 'bitsandbytes>=0.50'`, or set optim.name to adamw"
        )
