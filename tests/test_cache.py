"""Tokenised data that was damaged, replaced or left half-made: made again or gone on with, never trained on as is."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import build, cache
from data.dataset import Dataset, Known, open_known, prepare
from data.sources import DataError, Source
from data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"sequence_tokens": 64, "packing": "packed", "on_bad_row": "skip", "over_long": "drop"}
ROWS = 1500


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ROOT / "recipes" / "base")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Rows of every fate: chats, texts that are split, texts that are dropped, and lines that are no rows."""
    rows = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(ROWS):
        if number % 50 == 7:
            lines.append("no row")
        elif number % 50 == 13:
            lines.append(json.dumps({"text": " "}))
        elif number % 10 == 3:
            lines.append(json.dumps({"text": f"word {number} " * 40}))
        else:
            turns = [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"It is {number}."},
            ]
            lines.append(json.dumps({"messages": turns}))
    (rows / "a.jsonl").write_text("\n".join(lines[:600]) + "\n")
    (rows / "b.jsonl").write_text("\n".join(lines[600:]) + "\n")
    return Source(str(rows))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Source, tokenizer: Tokenizer) -> Dataset:
    return prepare([source], tokenizer=tokenizer, cache=tmp_path_factory.mktemp("whole"), **SETTINGS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- verified against the manifest ---


def flip(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


def replace(path: Path, contents: bytes | None = None) -> None:
    path.unlink()
    if contents is None:
        path.mkdir()
    else:
        path.write_bytes(contents)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


MANIFEST = "manifest.json"
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    **{f"{name}-bit": (name, flip, "was changed after it was written") for name in cache.FILES},
    **{f"{name}-gone": (name, Path.unlink, "is missing") for name in cache.FILES},
    **{f"{name}-cut": (name, lambda path: os.truncate(path, 9), "has 9 bytes instead of") for name in cache.FILES},
    "untrained": ("trained.bin", lambda p: p.write_bytes(bytes(p.stat().st_size)), "was changed after it was written"),
    "folder": ("tokens.bin", replace, "is not a file"),
    "fifo": ("offsets.npy", fifo, "is not a file"),
    "dangling": ("tokens.bin", lambda p: (p.unlink(), p.symlink_to("nowhere")), "is missing"),
    "manifest-gone": (MANIFEST, Path.unlink, "is missing"),
    "manifest-empty": (MANIFEST, lambda p: p.write_bytes(b""), "is not a file of ours"),
    "manifest-binary": (MANIFEST, lambda p: p.write_bytes(bytes(range(256))), "is not a file of ours"),
    "manifest-list": (MANIFEST, lambda p: p.write_text("[1, 2]"), "is not a file of ours"),
    "manifest-number": (MANIFEST, lambda p: p.write_text("9" * 5000), "is not a file of ours"),
    "manifest-deep": (MANIFEST, lambda p: p.write_text("[" * 100_000), "is not a file of ours"),
    "manifest-other": (MANIFEST, lambda p: p.write_text('{"tokens": 3}'), "is not a file of ours"),
    "manifest-edited": (MANIFEST, lambda p: edit(p, pad_id=0), "was changed after it was written"),
    "manifest-fifo": (MANIFEST, fifo, "is not a file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_as_it_was_written_is_made_again_and_said(
    name: str, tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    file, damage, fault = DAMAGE[name]
    folder = Path(shutil.copytree(whole.folder, tmp_path / whole.folder.name))
    damage(folder / file)
    told: list[str] = []
    found = prepare([source], tokenizer=tokenizer, cache=tmp_path, report=told.append, **SETTINGS)
    assert contents(found.folder) == contents(whole.folder)
    assert re.fullmatch(rf"{folder / file}: {fault}.*; it is not trained on but made again.*", told[0]), told
    assert len(told) == 1
    told.clear()
    prepare([source], tokenizer=tokenizer, cache=tmp_path, report=told.append, **SETTINGS)
    assert told == []


def test_the_cache_of_other_data_under_this_name_is_foreign(
    tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    other = prepare([source], tokenizer=tokenizer, cache=tmp_path, **SETTINGS | {"sequence_tokens": 32})
    other.folder.rename(tmp_path / whole.folder.name)
    told: list[str] = []
    found = prepare([source], tokenizer=tokenizer, cache=tmp_path, report=told.append, **SETTINGS)
    assert contents(found.folder) == contents(whole.folder)
    assert "manifest.json: belongs to other data, or to an earlier version" in told[0]
    assert [path.name for path in tmp_path.iterdir() if "aside" in path.name] == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_ours_is_put_aside_and_not_deleted(
    kind: str, tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    place, notes = tmp_path / "cache" / whole.folder.name, tmp_path / "notes"
    place.parent.mkdir()
    notes.mkdir()
    (notes / "thesis.txt").write_text("mine")
    if kind == "link":
        place.symlink_to(notes)
    else:
        shutil.copytree(notes, place) if kind == "folder" else place.write_text("mine")
    told: list[str] = []
    found = prepare([source], tokenizer=tokenizer, cache=place.parent, report=told.append, **SETTINGS)
    assert contents(found.folder) == contents(whole.folder)
    aside = place.with_name(f"{place.name}.aside-1")
    assert (aside.read_text() if kind == "file" else (aside / "thesis.txt").read_text()) == "mine"
    assert f"(what was there is {aside} now, since not all of it is ours)" in told[0]
    assert (notes / "thesis.txt").read_text() == "mine"


def test_a_cache_that_cannot_be_written_is_read(
    tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    """Whole data needs no lock and no write: nothing in the folder or beside it changes."""
    shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    prepare([source], tokenizer=tokenizer, cache=tmp_path, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [whole.folder.name]


# --- once a start ---


def test_sources_and_data_are_read_once(
    tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that prepares hashes each file once; one that opens what is known hashes nothing."""
    from data import dataset

    shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    read: list[str] = []
    for module in (cache, dataset):
        hashing = module.sha256_of
        monkeypatch.setattr(
            module, "sha256_of", lambda path, progress, real=hashing: (read.append(path.name), real(path, progress))[1]
        )
    found = prepare([source], tokenizer=tokenizer, cache=tmp_path, **SETTINGS)
    assert sorted(read) == sorted(["a.jsonl", "b.jsonl", *cache.FILES])
    read.clear()
    assert open_known(tmp_path, found.known).sha256 == found.sha256
    assert read == []
    prepare([Source("gone.jsonl")], tokenizer=tokenizer, cache=tmp_path, known=found.known, **SETTINGS)
    assert sorted(read) == sorted(cache.FILES)  # another host compares what it will map, and needs no sources for it


def test_another_host_whose_data_differs_is_refused(
    tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    made = prepare([source], tokenizer=tokenizer, cache=tmp_path / "there", known=whole.known, **SETTINGS)
    assert made.known == whole.known
    (tmp_path / "other.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match=r"other\.jsonl: the data on \S+ differs from that of rank 0"):
        prepare(
            [Source(str(tmp_path / "other.jsonl"))],
            tokenizer=tokenizer,
            cache=tmp_path / "here",
            known=whole.known,
            **SETTINGS,
        )
    with pytest.raises(DataError, match="differs from that of rank 0"):
        prepare(
            [source], tokenizer=tokenizer, cache=tmp_path / "there", known=Known(whole.known.key, "0" * 64), **SETTINGS
        )


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "first"}\n' * 1000)

    def changes(line: str) -> None:
        source.write_text('{"text": "later"}\n' * 900)

    settings = SETTINGS | {"sequence_tokens": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "REPORT_EVERY_ROWS", 500)
        with pytest.raises(DataError, match=r"a\.jsonl: a file was changed while it was read"):
            prepare([Source(str(source))], tokenizer=tokenizer, cache=tmp_path / "cache", report=changes, **settings)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


# --- gone on with ---

BUILDER = """
import os, signal, sys
from pathlib import Path
from data import build, dataset
from data.sources import Source
from data.tokenizer import load_tokenizer
build.ROWS_AT_ONCE, build.SECONDS_BETWEEN_SAVES = 64, 0.0
groups = [0]
def progress():
    groups[0] += 1
    if groups[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
found = dataset.prepare([Source(sys.argv[1])], tokenizer=load_tokenizer(Path("recipes/base")), cache=Path(sys.argv[2]),
    sequence_tokens=64, packing="packed", on_bad_row="skip", over_long="drop",
    report=lambda line: print(line, flush=True), progress=progress)
print("made", found.sha256)
"""


def build_and_die(source: Source, where: Path, moment: int) -> tuple[int, str]:
    command = [sys.executable, "-c", BUILDER, source.path, str(where), str(moment)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_build_that_is_killed_again_and_again_becomes_the_same_data(
    tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    """Killed among the rows, and among the packs; each start goes on where the one before was."""
    rows_done = []
    for moment in (900, 2100):
        code, told = build_and_die(source, tmp_path, moment)
        assert code == -signal.SIGKILL, told
        rows_done.append(
            int(json.loads((tmp_path / f"{whole.folder.name}.tmp" / "journal.json").read_text())["rows_read"])
        )
    assert 0 < rows_done[0] < rows_done[1] == ROWS
    told_now: list[str] = []
    prepare([source], tokenizer=tokenizer, cache=tmp_path, report=told_now.append, **SETTINGS)
    assert told_now == [f"continuing to tokenise after {ROWS:,} rows that an earlier start has read"]
    assert contents(tmp_path / whole.folder.name) == contents(whole.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [whole.folder.name, f"{whole.folder.name}.lock"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, source: Source) -> Path:
    where = tmp_path_factory.mktemp("killed")
    assert build_and_die(source, where, 1000)[0] == -signal.SIGKILL
    return where


@pytest.fixture
def half(tmp_path: Path, killed: Path, whole: Dataset) -> Path:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path / f"{whole.folder.name}.tmp"


def test_what_came_after_the_journal_is_cut_off(
    half: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    for name in build.GROWING:
        with (half / name).open("ab") as file:
            file.write(b"torn")
    (half / "journal.json.new").write_bytes(b"{")
    told: list[str] = []
    found = prepare([source], tokenizer=tokenizer, cache=half.parent, report=told.append, **SETTINGS)
    assert contents(found.folder).items() >= contents(whole.folder).items()
    assert told[0].startswith("continuing to tokenise after")


@pytest.mark.parametrize("name", ["journal.json", "tokens.bin", "trained.bin", "lengths.bin"])
def test_a_half_made_folder_that_was_damaged_is_made_anew_and_said(
    name: str, half: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    flip(half / name)
    told: list[str] = []
    found = prepare([source], tokenizer=tokenizer, cache=half.parent, report=told.append, **SETTINGS)
    assert contents(found.folder) == contents(whole.folder)
    assert re.match(rf"{half / name}: .*; the half-made tokenised data is not continued but made anew", told[0])


@pytest.mark.slow
def test_waiting_for_another_process_that_gets_on_is_progress(
    tmp_path: Path, whole: Dataset, source: Source, tokenizer: Tokenizer
) -> None:
    slow = BUILDER.replace("groups[0] += 1", "groups[0] += 1; groups[0] % 100 or __import__('time').sleep(0.3)")
    command = [sys.executable, "-c", slow, source.path, str(tmp_path), "-1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        while not (tmp_path / f"{whole.folder.name}.tmp" / "journal.json").exists():
            assert other.poll() is None
            time.sleep(0.05)
        told: list[str] = []
        moves: list[float] = []
        found = prepare(
            [source],
            tokenizer=tokenizer,
            cache=tmp_path,
            report=told.append,
            progress=lambda: moves.append(time.monotonic()),
            **SETTINGS,
        )
        ended = time.monotonic()
        assert other.wait() == 0
    assert found.known == whole.known
    assert told == [f"waiting for another process that is making {tmp_path / whole.folder.name}"]
    assert len([move for move in moves if move < ended]) >= 3
