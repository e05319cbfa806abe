"""Run folders as others left them: told at the start, in one sentence, and never with a traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run.folder import check_folder, claim, finished_step, folder_of, recipe_of, stopped_step
from finetune.run.place import check_place, hold, place_notes
from finetune.run.watchdog import Watch
from tests.commands import ROOT

NOBODY = 65534


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny.yaml", [f"output.dir={tmp_path}/runs"])


@pytest.fixture
def run(recipe: Recipe) -> Path:
    """A run folder that has been claimed."""
    claim(folder_of(recipe), recipe).release()
    return folder_of(recipe)


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """As this user, since every folder is open to root."""
    before = os.geteuid()
    if before != 0:
        pytest.skip("only root can become another user")
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("marker", ["finished.json", "stopped.json"])
@pytest.mark.parametrize(
    "contents",
    [
        *(b"", b"[]", b"{}", b'{"step": "6"}', b'{"step": -1}', b'{"step": true}', b'{"step": 1.5}', b"\xff"),
        *(b"[" * 99_999, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": null}', b"null", b"\0" * 100),
    ],
)
def test_a_marker_that_names_no_step_is_one_sentence(run: Path, marker: str, contents: bytes) -> None:
    (run / marker).write_bytes(contents)
    with pytest.raises(RecipeError) as error:
        (finished_step if marker == "finished.json" else stopped_step)(run)
    assert str(error.value).startswith(f"{run / marker}: says nothing about the run (")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("; delete it, and the same command continues the run from its newest checkpoint")


def test_a_marker_that_is_no_file_is_one_sentence(run: Path) -> None:
    (run / "finished.json").mkdir()
    os.mkfifo(run / "stopped.json")
    with pytest.raises(RecipeError, match=r"finished\.json: says nothing about the run \(is a folder, not a"):
        finished_step(run)
    with pytest.raises(RecipeError, match=r"stopped\.json: says nothing about the run \(is a FIFO, not a"):
        stopped_step(run)


def test_a_lock_that_cannot_be_taken_is_one_sentence(run: Path, recipe: Recipe) -> None:
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").mkdir()
    for take in (lambda: hold(run), lambda: claim(run, recipe)):
        with pytest.raises(RecipeError, match=r"/\.lock: cannot be locked \(.*\); remove it if it is no plain file"):
            take()


@pytest.mark.parametrize("contents", [b"", b"\xff", b"{}", b"a: [", b"[" * 9999, b"name: 5\nx: 1\n"])
def test_a_recipe_of_the_run_that_cannot_be_read_is_one_sentence(run: Path, recipe: Recipe, contents: bytes) -> None:
    (run / "recipe.yaml").write_bytes(contents)
    with pytest.raises(RecipeError) as error:
        check_folder(run, recipe)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{run}/recipe.yaml:")
    assert "; this file says what the run in that folder is, so put it back as it was, or give this run a" in line


@pytest.mark.parametrize("name", ["checkpoints", "crash", "routing", "wandb"])
def test_a_file_where_the_run_needs_a_folder_is_told_at_the_start(run: Path, recipe: Recipe, name: str) -> None:
    (run / name).touch()
    with pytest.raises(RecipeError, match=rf"/{name}: is not a folder that you can write to, but the run needs it"):
        check_folder(run, recipe)


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_folder_without_permission_is_told_at_the_start(run: Path, recipe: Recipe, name: str, tmp_path: Path) -> None:
    for place in (tmp_path, *tmp_path.parents[:2]):
        place.chmod(0o755)
    (run / "checkpoints").mkdir()
    os.chown(run, NOBODY, NOBODY)
    os.chown(run / "checkpoints", NOBODY, NOBODY)
    (run / name).chmod(0o555)
    with as_user(NOBODY), pytest.raises(RecipeError, match=r"not a folder (open to you|that you can write to)"):
        check_folder(run, recipe)


def test_what_lies_behind_a_closed_folder_is_told(run: Path, recipe: Recipe, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with as_user(NOBODY):
        with pytest.raises(RecipeError, match=r"because .* is not a folder open to you"):
            check_folder(run, recipe)
        with pytest.raises(RecipeError, match="not the folder of a run"):
            recipe_of(run)


def test_a_folder_that_others_may_change_is_not_used(run: Path, recipe: Recipe) -> None:
    run.chmod(0o777)
    check_folder(run, recipe)  # my own, however open
    if os.geteuid() == 0:
        os.chown(run, NOBODY, NOBODY)
        with pytest.raises(RecipeError, match="belongs to another user, and everyone may change what is in it"):
            check_folder(run, recipe)
        run.chmod(0o775)
        check_folder(run, recipe)


@pytest.mark.parametrize("path", ["/", "//", "/usr/..", "/./"])
def test_a_run_is_not_put_into_the_root(path: str, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"output\.dir: is the root of the file system; name a folder"):
        load_recipe(ROOT / "recipes/tiny.yaml", [f"output.dir={path}"])
    with pytest.raises(RecipeError, match=r"output\.dir: is the root of the file system; name a folder"):
        check_place(Path(path) / "tiny")


def test_links_in_a_circle_are_told(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(RecipeError, match=r"because .*/a is not a folder open to you"):
        check_place(tmp_path / "a/tiny")


def test_a_path_without_room_for_checkpoints_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has 4\d\d\d bytes, but a path may have 3895 here"):
        check_place(tmp_path / ("a/" * 2000) / "tiny")
    with pytest.raises(RecipeError, match=r"holds a name of 300 bytes, but a file's may have 255"):
        check_place(tmp_path / ("a" * 300) / "tiny")


def test_files_of_no_run_are_noted(tmp_path: Path, run: Path) -> None:
    assert place_notes(run) == []
    assert place_notes(tmp_path / "new") == []
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / ".shared-1").touch()
    assert place_notes(foreign) == []
    for name in ("a.txt", "b", "c", "d", "metrics.jsonl"):
        (foreign / name).touch()
    assert place_notes(foreign) == [
        f"output.dir: {foreign} holds files of no run (a.txt, b, c and 1 more); this run is put beside them"
    ]


def test_a_home_folder_in_a_path_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", ["output.dir=~/runs"])
    assert folder_of(recipe) == tmp_path / "runs/tiny"


@pytest.mark.parametrize("make", [lambda p: p.parent.touch(), lambda p: p.mkdir(parents=True)])
def test_a_stack_that_cannot_be_kept_stops_no_run(make: object, tmp_path: Path) -> None:
    """`crash` is a file, or the stack's name is taken by a folder."""
    make(tmp_path / "crash/rank0.stack")  # type: ignore[operator]
    watch = Watch(tmp_path, 0, 60)
    watch.begin()
    watch.beat()
    watch.end()
