"""Ranks that differ in programs, data or disk are told so before they train; fewer ranks share the experts out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.agreement import check_agreement, refuse_differences
from finetune.failure import LostRankError, is_told, tell, told_by_every_host
from finetune.launch import fit_to_ranks, is_lost_connection, ranks_here
from finetune.parallel import world as worlds
from finetune.parallel.world import MeetingError, RankError
from finetune.recipe import CHECKOUT, Recipe, RecipeError, load_recipe
from tests.commands import free_port
from tests.ranks import ranks


def recipe(*overrides: str) -> Recipe:
    return load_recipe(CHECKOUT / "recipes/tiny.yaml", overrides)


def agree(rank: int, runs: list[Path], bases: list[Path], seeds: list[int]) -> str | None:
    """What a rank is told when its folder, base model or recipe is its own."""
    world = worlds.start(1)
    try:
        check_agreement(recipe(f"train.seed={seeds[rank]}"), runs[rank] / "tiny", bases[rank], world)
    except RankError as error:
        return str(error)
    return None


def base(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_ranks_with_the_same_of_everything_leave_nothing_behind(tmp_path: Path) -> None:
    same = base(tmp_path / "base", b"1")
    assert ranks(2, agree, [tmp_path] * 2, [same] * 2, [0, 0]) == [None, None]
    assert list(tmp_path.iterdir()) == [same]


def test_a_folder_that_is_not_shared_is_refused_on_every_rank(tmp_path: Path) -> None:
    same, own = base(tmp_path / "base", b"1"), [tmp_path / "one", tmp_path / "two"]
    for folder in own:
        folder.mkdir()
    (own[0] / "only-here").mkdir()
    first, second = ranks(2, agree, [own[0] / "only-here", own[1] / "only-here"], [same] * 2, [0, 0])
    assert first == second
    assert first.startswith("output.dir: ")
    assert "so set output.dir to a disk that all hosts share" in first
    assert not list((own[0] / "only-here").iterdir())


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ({"weights": b"2"}, "the base model in {folder}/other on "),
        ({"seed": 1}, "the recipe on "),
    ],
)
def test_what_differs_is_named_with_its_host(tmp_path: Path, second: dict[str, Any], sentence: str) -> None:
    one, other = base(tmp_path / "base", b"1"), base(tmp_path / "other", second.get("weights", b"1"))
    told = ranks(2, agree, [tmp_path] * 2, [one, other], [0, second.get("seed", 0)])
    assert told[0] == told[1]
    assert told[0].startswith(sentence.format(folder=tmp_path))
    assert "(rank 1) differs from " in told[0]


def test_other_libraries_are_named_with_both_versions() -> None:
    told = ranks(2, with_other_libraries)
    assert told[0] == told[1]
    assert "(torch 2.14, numpy 2.0 there, torch 2.13, numpy 2.0 here)" in told[0]


def with_other_libraries(rank: int) -> str:
    try:
        refuse_differences({"Python and its libraries": f"torch 2.1{3 + rank}, numpy 2.0"}, worlds.start(1))
    except RankError as error:
        return str(error)
    raise AssertionError("nothing was refused")


# Another number of ranks.


@pytest.mark.parametrize(
    ("written", "size", "expert"),
    [
        ((2, 2), 1, 1),
        ((16, 16), 8, 8),  # one of two machines is left
        ((24, 8), 16, 8),
        ((16, 16), 12, 4),
        ((8, 4), 3, 1),
        ((2, 2), 4, 2),  # more than the recipe says: as it says
        ((1, 1), 8, 1),
    ],
)
def test_fewer_ranks_share_the_experts_out_by_one_rule(written: tuple[int, int], size: int, expert: int) -> None:
    told: list[str] = []
    parallel = [f"parallel.ranks={written[0]}", f"parallel.expert={written[1]}", "train.global_batch_tokens=49152"]
    asked = recipe(*parallel)
    fitted = fit_to_ranks(asked, size, told.append)
    assert fitted.parallel.expert == expert
    assert fitted.train == asked.train
    assert bool(told) == (expert != written[1])
    fitted.check_ranks(size, 512)


def test_a_number_of_ranks_that_the_batch_does_not_divide_over_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train.global_batch_tokens: 4096 is not a multiple"):
        fit_to_ranks(recipe("parallel.ranks=4", "parallel.expert=4"), 3, lambda line: None).accumulation(3)


def test_a_machine_with_fewer_gpus_starts_as_many_ranks_as_the_batch_divides_over() -> None:
    asked = recipe("parallel.ranks=4", "parallel.expert=4")
    assert [ranks_here(asked, gpus) for gpus in (1, 2, 3, 4, 6)] == [1, 2, 2, 4, 4]


# What is told, and by whom.


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:525] Connection closed by peer [10.77.0.2]:55310"), True),
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection reset by peer"), True),
        (
            torch.distributed.DistBackendError("NCCL error ... ncclRemoteError: A call failed"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_a_lost_connection_is_told_from_a_bug(error: Exception, lost: bool) -> None:
    assert is_lost_connection(error) == lost


def test_a_rank_that_lost_another_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert is_told(LostRankError("x"))
    tell(LostRankError("lost the connection"))
    assert capsys.readouterr().err.startswith("nextune: rank 3 on ")


@pytest.mark.parametrize(("rank", "local", "speaks"), [("0", "0", False), ("8", "0", True), ("9", "1", False)])
def test_a_mistake_of_one_host_is_told_by_its_first_rank(
    rank: str, local: str, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 tells it where all mistakes are told."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    with pytest.raises(RecipeError), told_by_every_host():
        raise RecipeError("no such file")
    assert ("no such file" in capsys.readouterr().err) == speaks


def test_a_meeting_that_does_not_come_about_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "MEETING", worlds.timedelta(seconds=2))
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MeetingError, match=r"^the 2 ranks do not find each other at 127.0.0.1:\d+ \(.*--master-port"):
        worlds.start(1)
