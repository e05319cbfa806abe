"""Checks at the start of a run that all ranks have the same code, libraries, recipe, base weights and run folder.

On several machines, a different checkout, environment or copy of the weights would train without an error but wrongly.
A run folder that is local to each machine would leave only a part of every checkpoint on each.
"""

import hashlib
import os
import platform
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import cast

from finetune.checkpoint.fingerprint import fingerprint
from finetune.distributed.world import RankError, World
from finetune.recipe.load import dump
from finetune.recipe.paths import CHECKOUT
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run.failure import LIBRARIES

PACKAGES = ("finetune", "data", "monitoring")
SECONDS_TO_APPEAR = 20  # of a new file on another machine: network disks cache metadata for a few seconds


def check_agreement(recipe: Recipe, folder: Path, base: Path, world: World) -> str:
    """Check that all ranks have the same code, libraries, recipe and base weights, and share the run folder.

    Collective. One rank of each host reads the base weights.

    Returns:
        The fingerprint of the base weights.

    Raises:
        RankError: something differs between hosts, the run folder is not shared or it cannot be written; on all ranks.
    """
    facts = {
        "Python and its libraries": ", ".join([platform.python_version(), *_versions()]),
        f"the code in {CHECKOUT}": _digest_of_code(),
        "the recipe": hashlib.sha256(dump(recipe).encode()).hexdigest(),
        f"the base model in {base}": fingerprint(base) if world.leads_host else None,
    }
    *_, base_now = refuse_differences(facts, world).values()
    _check_shared(folder, world)
    assert base_now is not None, "rank 0 leads its host"
    return base_now


def refuse_differences(facts: Mapping[str, str | None], world: World) -> dict[str, str | None]:
    """Raise an error on all ranks if a rank's facts differ from those of rank 0. Collective.

    Args:
        facts: values by a description that fits the sentence `X on HOST differs`; None if another rank of the host
            determines the value.

    Returns:
        The facts of rank 0.

    Raises:
        RankError: names the first fact that differs, and the host.
    """
    everyone = cast(list[tuple[str, dict[str, str | None]]], world.gather((socket.gethostname(), facts)))
    first_host, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        for (name, value), (name_there, value_there) in zip(expected.items(), found.items(), strict=True):
            if name != name_there or value_there not in (None, value):
                values = f" ({_short(value_there)} there, {_short(value)} here)"
                raise RankError(
                    f"{name_there} on {host} (rank {rank}) differs from {name} on {first_host} (rank 0){values}; every"
                    " host needs the same, from a shared disk or as an exact copy"
                )
    return expected


def _check_shared(folder: Path, world: World) -> None:
    """Check that every rank sees a file that rank 0 creates in the run folder or its nearest existing parent."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    token = cast(str, world.gather(secrets.token_hex(8))[0])
    mark = there / f".shared-{token}"
    with world.together(RecipeError):
        if world.is_main:
            try:
                mark.touch()
            except OSError as error:
                raise RecipeError(f"output.dir: {there} cannot be written ({error.strerror or error})") from None
    answers = cast(list[tuple[bool, str, str]], world.gather((_appears(mark), socket.gethostname(), str(folder))))
    if world.is_main:
        with suppress(OSError):  # an empty file that remains does no harm
            mark.unlink()
    blind = sorted({host for sees, host, _ in answers if not sees})
    if blind:
        raise RankError(
            f"output.dir: {answers[0][2]} on {', '.join(blind)} is not the folder that rank 0 sees on {answers[0][1]};"
            " every rank writes its part of a checkpoint there, so set output.dir to a disk that all hosts share"
        )


def _appears(path: Path) -> bool:
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > end or not path.parent.exists():
            return False
        with os.scandir(path.parent) as entries:  # listing the folder makes a network disk refresh its cache
            next(entries, None)
        time.sleep(0.2)
    return True


def _versions() -> list[str]:
    return [f"{name} {metadata.version(name)}" for name in LIBRARIES]


def _digest_of_code() -> str:
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(CHECKOUT)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _short(value: str | None) -> str:
    return "not looked at" if value is None else value if "," in value else value[:12]
