"""What must be the same for every rank before they work together, proved at the start of every run.

Ranks on one machine agree by themselves. Over several machines a checkout, an environment or a copy of the data that
differs would train, and train wrongly; a run folder that each machine has for itself would leave half of every
checkpoint on each.
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
SECONDS_TO_APPEAR = 20  # of a new file on another machine: a network disk keeps what it knows for a few seconds


def check_agreement(recipe: Recipe, folder: Path, base: Path, world: World) -> str:
    """Make sure that all ranks have the same programs, recipe and base weights, and see one run folder. Collective.

    One rank of each host looks into the base weights.

    Returns:
        The fingerprint of the base weights.

    Raises:
        RankError: on all ranks; says what differs between which hosts, or which hosts have another disk, or that the
            run folder's cannot be written.
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
    """End the run if a rank has another value of a fact than rank 0. Collective.

    Args:
        facts: by what they say, in words that fit the sentence `X on HOST differs`; None where another rank of the
            host looks.

    Returns:
        The facts of rank 0.

    Raises:
        RankError: the first fact that differs, and where.
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
    """Rank 0 leaves a file where the run folder is or will be; every other rank must find it there."""
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
        with suppress(OSError):  # an empty file, and training needs no deleting
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
        with os.scandir(path.parent) as entries:  # reading the folder makes a network disk look again
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
