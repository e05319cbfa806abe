"""The W&B id of a run folder, whatever lies in its place."""

import os
from pathlib import Path

import pytest

from monitoring.run_id import keep_run_id, known_run_id, run_id


def test_an_id_is_made_once_and_kept(tmp_path: Path) -> None:
    assert known_run_id(tmp_path) is None
    made = run_id(tmp_path)
    assert (run_id(tmp_path), known_run_id(tmp_path)) == (made, made)
    keep_run_id(tmp_path, "abc-1")
    assert run_id(tmp_path) == "abc-1"


@pytest.mark.parametrize("contents", [b"", b"\xff\xfe", b"a b", b"../x", b"\0" * 9, b"x" * 5000])
def test_what_is_no_id_is_replaced_with_a_word(
    contents: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/run-id").write_bytes(contents)
    assert known_run_id(tmp_path) is None
    assert caplog.messages == [
        f"{tmp_path}/wandb/run-id: holds no id of a W&B run; W&B shows what follows as a run of its own"
    ]
    assert run_id(tmp_path) == known_run_id(tmp_path)


def test_what_is_no_file_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb").mkdir()
    os.mkfifo(tmp_path / "wandb/run-id")
    assert known_run_id(tmp_path) is None
    assert "is a FIFO, not a regular file; W&B shows what follows as a run of its own" in caplog.text
