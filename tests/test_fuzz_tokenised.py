"""Damaged tokenised data: what is trained is what the source says, made again if need be, or it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.dataset import prepare
from data.sources import Source
from data.tokenizer import load_tokenizer
from tests.fuzzing import changed_bytes, changed_file, few_and_many, fuzz, verdict

BASE = Path(__file__).resolve().parent.parent / "recipes/base"


@few_and_many(12)
@pytest.mark.parametrize(
    "name", ["manifest.json", "tokens.bin", "trained.bin", "offsets.npy", "pack_documents.npy", "pack_offsets.npy"]
)
def test_tokenised_data(tmp_path: Path, examples: int, name: str) -> None:
    """What is trained is what the source says: changed files are refused or made again."""
    plain = load_tokenizer(BASE)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": f"number {n} " * (n % 5 + 1)}) + "\n" for n in range(12)))

    def prepared(cache: Path) -> Any:
        return prepare(
            [Source(str(source))],
            tokenizer=plain,
            sequence_tokens=32,
            packing="packed",
            on_bad_row="stop",
            over_long="drop",
            cache=cache,
        )

    def contents(dataset: Any) -> list[Any]:
        return [[(d.ids.tolist(), d.trained.tolist()) for d in dataset.documents(i)] for i in range(len(dataset))]

    whole = contents(prepared(tmp_path / "whole"))
    folder = next(path for path in (tmp_path / "whole").iterdir() if path.is_dir())
    valid = (folder / name).read_bytes()
    files = changed_file(json.loads(valid)) if name == "manifest.json" else changed_bytes(valid)

    def check(content: bytes) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        (tmp_path / "copy" / folder.name / name).write_bytes(content)
        found = verdict(lambda: prepared(tmp_path / "copy"), tmp_path)
        if not isinstance(found, ValueError):
            assert contents(found) == whole, "other tokens than the source has"

    fuzz(check, files, examples)
