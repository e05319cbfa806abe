"""Which rank reads what of the data at a start: the sources once in all, the cache once on each host."""

import json
import os
from pathlib import Path

import pytest

from data import cache, dataset
from data.tokenizer import load_tokenizer
from finetune.distributed import world as worlds
from finetune.distributed.world import RankError
from finetune.recipe.load import load_recipe
from finetune.training import assembly
from tests.ranks import ranks

ROOT = Path(__file__).resolve().parent.parent
SOURCES, CACHE = ["eval.jsonl", "train.jsonl"], sorted(2 * cache.FILES)


def recipe_of(folder: Path, where: str):
    settings = [
        f"output.dir={folder}",
        f"data.cache={folder / where}",
        f"data.train=[{{path: {folder}/train.jsonl}}]",
        f"data.eval=[{{path: {folder}/eval.jsonl}}]",
        *("train.sequence_tokens=64", "train.micro_batch_tokens=64", "train.global_batch_tokens=128"),
    ]
    return load_recipe(ROOT / "recipes/tiny.yaml", settings)


def starts(rank: int, folder: Path) -> dict[str, object]:
    """The names of the files that this rank hashes, start by start, and what the last one tells."""
    read: list[str] = []
    for module in (cache, dataset):  # in this process, which is the rank's own

        def counted(path, progress, real=module.sha256_of):
            read.append(path.name)
            return real(path, progress)

        module.sha256_of = counted
    world, answers = worlds.start(1), {}
    for name, hosts, where in (
        ("first", 1, "shared"),
        ("second", 1, "shared"),
        ("shared disk", 2, "shared"),
        ("own disks", 2, f"disk-{rank}"),
    ):
        os.environ["LOCAL_RANK"] = str(rank % (2 // hosts))
        read.clear()
        tokenizer = lambda: load_tokenizer(ROOT / "recipes/base")  # noqa: E731
        train, held_out = assembly._datasets_of_all(recipe_of(folder, where), tokenizer, world, lambda: None)
        answers[name] = sorted(read)
        answers[f"{name}: data"] = (train.sha256, held_out.sha256)
    path = folder / f"own-{rank}"  # two hosts with other rows under one name
    path.mkdir()
    for file in SOURCES:
        (path / file).write_text((folder / file).read_text() + json.dumps({"text": f"rank {rank} " * 90}) + "\n")
    try:
        assembly._datasets_of_all(recipe_of(path, "cache"), tokenizer, world, lambda: None)
    except RankError as error:
        answers["other rows"] = str(error)
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 40), ("eval", 5)):
        rows = [{"text": f"{name} {number} " * 30} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ranks(2, starts, folder)


def test_the_first_start_reads_the_sources_once_in_all(answers: list[dict[str, object]]) -> None:
    assert [each["first"] for each in answers] == [SOURCES, []]


def test_a_later_start_compares_the_cache_once(answers: list[dict[str, object]]) -> None:
    assert [each["second"] for each in answers] == [sorted([*SOURCES, *CACHE]), []]


def test_another_host_compares_the_cache_that_it_shares_and_reads_no_source(answers: list[dict[str, object]]) -> None:
    assert [each["shared disk"] for each in answers] == [sorted([*SOURCES, *CACHE]), CACHE]


def test_another_host_with_a_disk_of_its_own_makes_the_same(answers: list[dict[str, object]]) -> None:
    assert [each["own disks"] for each in answers] == [SOURCES, SOURCES]
    assert len({each[f"{name}: data"] for each in answers for name in ("first", "second", "own disks")}) == 1


def test_another_host_with_other_rows_is_refused(answers: list[dict[str, object]]) -> None:
    assert answers[0]["other rows"] == answers[1]["other rows"]
    assert "train.jsonl: the data on " in str(answers[0]["other rows"])
    assert "differs from that of rank 0" in str(answers[0]["other rows"])
