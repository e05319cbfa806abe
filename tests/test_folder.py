"""Folders that appear whole or not at all, with the writer killed at every one of its moments."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint.folder import TEMPORARY, whole_folder
from finetune.checkpoint.layout import CheckpointError
from finetune.training.nonfinite import BATCH, FACTS, _check_own

MOMENTS = 60  # more than a write has; what is left over are writes that end


def write(to: Path) -> None:
    with whole_folder(to) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/a").write_text("a")
        (folder / "b").write_text("b")


def killed_at(to: Path, moment: int) -> None:
    """Write, and be killed when the file system is about to be changed for the `moment`-th time."""
    left = [moment]

    def heed(event: str, _: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "shutil.rmtree"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heed)
    write(to)


def in_a_child(function: Callable[..., None], *arguments: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def test_a_write_that_is_killed_at_any_moment_is_in_nobodys_way(tmp_path: Path) -> None:
    ends = []
    for moment in range(MOMENTS):
        to = tmp_path / str(moment)
        ends.append(in_a_child(killed_at, to, moment))
        whole = to.exists()
        assert not whole or {path.name for path in to.rglob("*")} == {"sub", "a", "b"}, moment
        if not whole:
            write(to)
        else:  # what a killed one leaves beside is in the way of no other write
            os.rename(to, tmp_path / f"{moment}-kept")
            write(to)
        assert {path.name for path in to.rglob("*")} == {"sub", "a", "b"}, moment
        assert not (tmp_path / f"{moment}{TEMPORARY}").exists(), moment
    killed = ends.count(-signal.SIGKILL)
    assert 12 <= killed < MOMENTS
    assert ends == [-signal.SIGKILL] * killed + [0] * (MOMENTS - killed)


@pytest.mark.parametrize("names", [["thesis.txt"], ["content"], ["being-written.lock", "thesis.txt"], None])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, names: list[str] | None) -> None:
    beside = tmp_path / f"out{TEMPORARY}"
    if names is None:
        beside.touch()
    else:
        beside.mkdir()
        for name in names:
            (beside / name).touch()
    with pytest.raises(CheckpointError, match="is in the way of writing out; rename or remove it"):
        write(tmp_path / "out")
    assert beside.is_file() if names is None else sorted(path.name for path in beside.iterdir()) == sorted(names)
    (tmp_path / "other.tmp").mkdir()  # a name that is nobody's
    write(tmp_path / "other")


def test_two_writers_of_one_folder_do_not_share_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "mine").touch()
        with pytest.raises(CheckpointError, match="out: another process is writing it now"):
            write(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("to", ["/", "/proc", "a-file/x", "x" * 300, "link"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, to: str) -> None:
    (tmp_path / "a-file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a-file")
    with pytest.raises(CheckpointError) as raised:
        write(tmp_path / to)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "link"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/b").read_text() == "b"


def test_a_folder_is_replaced_only_with_leave(tmp_path: Path) -> None:
    asked = []
    write(tmp_path / "out")
    with whole_folder(tmp_path / "out", check_replaceable=asked.append) as folder:
        (folder / "new").touch()
    assert asked == [tmp_path / "out"] * 2
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]

    def refuse_late(to: Path) -> None:
        asked.append(to)
        if len(asked) == 4:
            raise CheckpointError("it was changed meanwhile")

    with (
        pytest.raises(CheckpointError, match="changed meanwhile"),
        whole_folder(tmp_path / "out", check_replaceable=refuse_late),
    ):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("deletable", [True, False])
def test_what_is_left_of_a_failed_write_is_said(
    tmp_path: Path, deletable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not deletable:
        monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)

    def write_half() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError) as raised:
        write_half()
    beside = tmp_path / f"out{TEMPORARY}"
    left = "nothing is left of it" if deletable else f"what is left of it is in {beside}"
    assert str(raised.value).endswith(f"No space left on device); {left}")
    assert beside.exists() != deletable
    monkeypatch.undo()
    write(tmp_path / "out")
    assert not beside.exists()


def test_a_step_that_is_kept_again_replaces_only_what_was_kept(tmp_path: Path) -> None:
    for name in (BATCH, FACTS):
        (tmp_path / name).touch()
    _check_own(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which is not of a kept step, and stays as it is"):
        _check_own(tmp_path)
