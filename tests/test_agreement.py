"""Ranks that differ in programs, data or disk are told so before they train; fewer ranks share the experts out."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.checkpoint.fingerprint import fingerprint
from finetune.commands.ranks import fit_to_ranks, ranks_here
from finetune.commands.train import is_lost_connection, is_timeout, lost
from finetune.distributed import world as worlds
from finetune.distributed.world import MeetingError, RankError
from finetune.recipe.load import load_recipe
from finetune.recipe.paths import CHECKOUT
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run import agreement
from finetune.run.agreement import check_agreement, refuse_differences
from finetune.run.failure import LostRankError, is_told, tell, told_by_every_host
from monitoring.files import replace_file
from tests.commands import free_port
from tests.ranks import ranks


def recipe(*overrides: str) -> Recipe:
    return load_recipe(CHECKOUT / "recipes/tiny.yaml", overrides)


# What is the second rank's own; all else is the same on both.
OWN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "run folder": {"runs": "two"},
    "base model": {"base": "other"},
    "recipe": {"seed": 1},
    "libraries": {"libraries": "torch 2.14, numpy 2.0"},
}


def told(rank: int, folder: Path) -> dict[str, str | None]:
    """What this rank is told in each case."""
    os.environ["LOCAL_RANK"] = "0"  # each on a host of its own
    world = worlds.start(1)
    answers: dict[str, str | None] = {}
    agreement.SECONDS_TO_APPEAR = 1  # in this process, which is the rank's own
    for case, own in OWN.items():
        mine = {"runs": "one", "base": "base", "seed": 0, "libraries": "torch 2.13, numpy 2.0"} | (own if rank else {})
        try:
            refuse_differences({"Python and its libraries": mine["libraries"]}, world)
            runs, base = folder / mine["runs"] / "tiny", folder / mine["base"]
            check_agreement(recipe(f"train.seed={mine['seed']}"), runs, base, world)
            answers[case] = None
        except RankError as error:
            answers[case] = str(error)
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two run folders, and two base models that differ in one byte."""
    made = tmp_path_factory.mktemp("agreement")
    for name in ("one", "two", "base", "other"):
        (made / name).mkdir()
    for name in ("base", "other"):
        (made / name / "config.json").write_text("{}")
        (made / name / "model.safetensors").write_text(name[0])
    return made


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, str | None]:
    first, second = ranks(2, told, folder)
    assert first == second  # on all ranks alike, so that none waits for one that has left
    return first


def test_ranks_with_the_same_of_everything_go_on(answers: dict[str, str | None]) -> None:
    assert answers["nothing"] is None


def fingerprints_taken(rank: int, folder: Path, hosts: int) -> tuple[int, str]:
    """How often this rank looks into the base weights, and what all are told of them."""
    os.environ["LOCAL_RANK"] = str(rank % (2 // hosts))
    taken, real = [], agreement.fingerprint

    def counted(base: Path) -> str:
        taken.append(base)
        return real(base)

    agreement.fingerprint = counted  # in this process, which is the rank's own
    found = check_agreement(recipe(), folder / "one" / "tiny", folder / "base", worlds.start(1))
    return len(taken), found


@pytest.mark.parametrize(("hosts", "expected"), [(1, [1, 0]), (2, [1, 1])])
def test_the_base_is_looked_into_once_on_each_host(folder: Path, hosts: int, expected: list[int]) -> None:
    answers = ranks(2, fingerprints_taken, folder, hosts)
    assert [taken for taken, _ in answers] == expected
    assert {found for _, found in answers} == {fingerprint(folder / "base")}


def told_of_a_full_disk(rank: int, folder: Path) -> str | None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    setattr(Path, "touch", full)  # noqa: B010 - in this process, which is the rank's own
    try:
        check_agreement(recipe(), folder / "one" / "tiny", folder / "base", worlds.start(1))
    except RankError as error:
        return str(error)
    return None


def test_a_disk_without_room_for_one_file_is_told_by_all(folder: Path) -> None:
    sentence = f"output.dir: {folder}/one cannot be written (No space left on device)"
    assert ranks(2, told_of_a_full_disk, folder) == [sentence] * 2


def test_a_run_folder_that_is_not_shared_is_refused(answers: dict[str, str | None], folder: Path) -> None:
    sentence = answers["run folder"]
    assert sentence is not None
    assert sentence.startswith(f"output.dir: {folder}/one/tiny on ")
    assert sentence.endswith("so set output.dir to a disk that all hosts share")
    assert not list((folder / "one").iterdir())  # nothing is left of the proof
    assert not list((folder / "two").iterdir())


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("base model", "the base model in {folder}/other on "),
        ("recipe", "the recipe on "),
        ("libraries", "Python and its libraries on "),
    ],
)
def test_what_differs_is_named_with_its_host(
    case: str, sentence: str, answers: dict[str, str | None], folder: Path
) -> None:
    said = answers[case]
    assert said is not None
    assert said.startswith(sentence.format(folder=folder))
    assert "(rank 1) differs from " in said
    if case == "libraries":
        assert "(torch 2.14, numpy 2.0 there, torch 2.13, numpy 2.0 here)" in said


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
    said: list[str] = []
    parallel = [f"parallel.ranks={written[0]}", f"parallel.expert={written[1]}", "train.global_batch_tokens=49152"]
    asked = recipe(*parallel)
    fitted = fit_to_ranks(asked, size, said.append)
    assert fitted.parallel.expert == expert
    assert fitted.train == asked.train
    assert bool(said) == (expert != written[1])
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


@pytest.mark.parametrize(
    ("error", "timed_out"),
    [
        (RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4200000ms for recv"), True),
        (torch.distributed.DistBackendError("WorkNCCL(...) ran for 4200000 milliseconds before timing out."), True),
        (RuntimeError("Connection closed by peer"), False),
    ],
)
def test_a_timeout_is_told_from_a_rank_that_has_ended(error: Exception, timed_out: bool, tmp_path: Path) -> None:
    assert (is_timeout(error), is_lost_connection(error)) == (timed_out, not timed_out)
    replace_file(tmp_path / "crash/rank1.stack", b"no progress")
    told = lost(tmp_path, 7, error)
    if timed_out:
        assert told.startswith("a collective timed out in step 7: a rank hangs, or its host is gone without a word;")
        assert f"the stacks of all ranks are in {tmp_path}/crash/ (" in told
    else:
        assert told.startswith("lost the connection to another rank in step 7: a rank or a host has ended (")


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
