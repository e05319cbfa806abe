"""Commands with arguments that nobody means: one sentence and exit code 2, whatever they are."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import cli
from finetune.recipe.paths import path_problem
from tests.commands import ROOT

TINY = ("--recipe", str(ROOT / "recipes/tiny.yaml"))
LARGE = "9" * 30


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that these arguments end with."""
    assert cli.main(arguments) == 2
    _, err = capsys.readouterr()
    assert err.startswith("nextune: ")
    assert len(err) < 1000
    return err.removeprefix("nextune: ").strip()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("name=" + "x" * 101, "name: may have at most 100 characters, found 'xxx"),
        ('name="\\ud800"', "name: holds half of a surrogate pair or a NUL character, which is no text"),
        ('monitor.project="a\\0"', "monitor.project: holds half of a surrogate pair or a NUL character, which is no"),
        ("\udcff=1", "is not UTF-8 text"),
        ('train={"\\ud800": 1}', "train: the key '\\ud800' is no text"),
        ("model.path=" + "x" * 300, "model.path: holds a name of 300 bytes, but a file's may have 255"),
        ("output.dir=" + "a/" * 3000, "output.dir: has 6000 bytes, but a path may have 4095 here"),
        ('data.cache="a\\0b"', "data.cache: holds half of a surrogate pair or a NUL character, which is no text"),
        ("model.path=~nobody-of-this-name/x", "model.path: '~nobody-of-this-name/x' exists neither in the current"),
        ("train.sequence_tokens=1", "train.sequence_tokens: must be at least 2, found 1"),
        (f"train.steps={LARGE}", f"train.steps: {LARGE} is larger than any setting may be"),
        ("train.epochs=1.7e308", "train.epochs: must be at most 1e+06, found 1.7e+308"),
        ("train.epochs=.inf", "train.epochs: must be at most 1e+06, found inf"),
        ("parallel.ranks=65537", "parallel.ranks: must be at most 65536, found 65537"),
        ("data.train.-1.path=x", "data.train.-1.path: data.train.-1 has nothing inside it to set"),
    ],
)
def test_settings(setting: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = told(["plan", *TINY, "--set", setting], capsys)
    assert f": {expected}" in sentence
    assert sentence.startswith("--set ")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "argument --recipe: the path '' is empty"),
        ("x" * 300, "holds a name of 300 bytes, but a file's may have 255"),
        ("\udcff", "argument --recipe: the path '\\udcff' is not UTF-8 text"),
        ("/", "/: cannot be read (Is a directory)"),
        ("/dev/zero", "/dev/zero: not a regular file; write the settings into one"),
        ("~nobody-of-this-name/x.yaml", "~nobody-of-this-name/x.yaml: no such file"),
        ("recipes/base/model.safetensors", "bytes, too many for a file of settings"),
    ],
)
def test_recipes(path: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in told(["plan", "--recipe", path], capsys)


def test_a_recipe_that_is_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in told(["plan", "--recipe", str(tmp_path / "pipe.yaml")], capsys)


@pytest.mark.parametrize("stem", ["-x", "my recipe", "x" * 101, ".x", "r\u00e9cit"])
def test_a_file_name_that_no_run_can_have(stem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / f"{stem}.yaml"
    written.write_text((ROOT / "recipes/tiny.yaml").read_text())
    sentence = told(["plan", "--recipe", str(written)], capsys)
    assert sentence.startswith(f"{written}:")
    assert ": name: missing, and the file's own, '" in sentence
    assert "cannot be that of a run; write one of at most 100 letters, digits" in sentence
    assert cli.main(["ranks", "--recipe", str(written), "--set", "name=x"]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "--recipe", "-x.yaml"], "--recipe needs a value; one that begins with '-' is written --recipe=VALUE"),
        (["plan", *TINY, "--set"], "--set needs a value; one that begins with '-' is written --set=VALUE"),
        (["plan", *TINY, "--device-gib", "nan"], "argument --device-gib: nan is not a number above 0 and below 1e+12"),
        (["plan", *TINY, "--device-gib", "1e300"], "argument --device-gib: 1e300 is not a number above 0 and below"),
        (["plan", *TINY, "--node-gbit", "inf"], "argument --node-gbit: inf is not a number above 0 and below 1e+12"),
        (["plan", *TINY, "--ranks", LARGE], f"argument --ranks: {LARGE} is not a whole number from 1 to 65,536"),
        (["plan", *TINY, "--ranks", "9" * 5000], "is not a whole number"),
        (["plan", *TINY, "--ranks", "1.5"], "argument --ranks: '1.5' is not a whole number"),
        (["data", *TINY, "--show", "-1"], "argument --show: -1 is not a whole number of at least 1"),
        (["hosts", "/"], "/: no readable hostfile here (is a folder, not a regular file)"),
        (["hosts", "/dev/zero"], "/dev/zero: no readable hostfile here (is a device, not a regular file)"),
        (["hosts", "x", "--node-rank", "-1"], "argument --node-rank: -1 is not a whole number of at least 0"),
        (["export", "", "--to", "x", "--format", "merged"], "argument RUN: the path '' is empty"),
        (["export", "x", "--to", "", "--format", "merged"], "argument --to: the path '' is empty"),
        (["export", "/", "--to", "x", "--format", "merged"], "/: not the folder of a run"),
        (["summary", "\udcff"], "argument RUN: the path '\\udcff' is not UTF-8 text"),
        (["replay", "/"], "/: not the folder of a run"),
        (["rewind", "x", "--to", "step-" + "9" * 5000], "holds a name of 5005 bytes, but a file's may have 255"),
        (
            ["export", "x", "--to", "y", "--format", "merged", "--checkpoint", ""],
            "argument --checkpoint: the path '' is",
        ),
        ([], "the following arguments are required: COMMAND"),
        (["\udcff"], "argument COMMAND: invalid choice: '\\udcff'"),
    ],
)
def test_arguments(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in told(arguments, capsys)


def test_the_home_folder_is_meant_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--to=~/x` reaches the command as it is written: the shell expands `~` only at the start of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path / 'a'}: not the folder of a run" in told(
        ["export", "~/a", "--to=~/x", "--format=merged"], capsys
    )
    assert f"{tmp_path / 'no.yaml'}: no such file" in told(["plan", "--recipe=~/no.yaml"], capsys)
    assert "~nobody-here/a: not the folder of a run" in told(["summary", "~nobody-here/a"], capsys)


def test_hosts_without_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("node1 slots=8\n")
    assert "across: names no command to run" in told(["across", str(tmp_path / "hosts")], capsys)


def test_a_current_folder_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert told(["plan", *TINY], capsys).startswith("the current folder cannot be used (No such file or directory)")


def test_a_reader_that_leaves_and_an_interrupt_end_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = f"{sys.executable} -m finetune keys | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", first], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_recipe", interrupted)
    assert cli.main(["plan", *TINY]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "nextune: interrupted\n"


def test_output_is_written_in_every_encoding(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetune", "plan", *TINY, "--set", "output.dir=r\u00e9cits"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    (tmp_path / "r\u00e9cits/tiny").mkdir(parents=True)
    (tmp_path / "r\u00e9cits/tiny/log.txt").touch()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"r\\xe9cits/tiny holds files of no run (log.txt)" in done.stdout


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a/b", None),
        ("x" * 255, None),
        ("\u20ac" * 85, None),
        ("\u20ac" * 86, "holds a name of 258 bytes, but a file's may have 255"),
        ("a/" * 2047, None),
        ("a/" * 2048, "has 4096 bytes, but a path may have 4095 here"),
        ("a\0b", "holds a NUL character, which no path can"),
        ("\udcff", "is not UTF-8 text"),
        ("", "is empty"),
    ],
)
def test_paths_that_no_file_can_have(text: str, problem: str | None) -> None:
    assert path_problem(text) == problem
    try:
        os.stat(text)
    except FileNotFoundError:
        assert problem in (None, "is empty", "is not UTF-8 text")
    except (OSError, ValueError):
        assert problem is not None
