"""Damaged files of a run and of the command line: refused in a sentence, or read as they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from finetune.checkpoint.resume import chosen_checkpoint, newest_checkpoint, open_state
from finetune.cluster.hostfile import read_hostfile
from finetune.commands.replay import read_step
from finetune.commands.summary import print_summary
from finetune.recipe.load import load_recipe
from finetune.run.folder import check_folder, claim, finished_step, stopped_step
from monitoring.metrics import MetricsFile, read_metrics
from monitoring.routing import RoutingSnapshot, read_snapshot, write_snapshot
from tests.checkpoints import write_checkpoint
from tests.fuzzing import changed_bytes, changed_file, few_and_many, fuzz, verdict

ROOT = Path(__file__).resolve().parent.parent
TENSORS = {"w::fp32": torch.arange(6.0), "w::exp_avg": torch.ones(6)}
STATE = {"step": 3, "position": 12, "best": {"step": 3, "loss": 2.0}, "base": "2-abc"}


def checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder / "checkpoints", 3, tensors=TENSORS, state=STATE)


def assert_as_written(folder: Path) -> None:
    """A checkpoint that is found whole holds what was written; one that is named and damaged is refused."""
    root = folder / "checkpoints"
    found = verdict(lambda: newest_checkpoint(root), None)
    if not isinstance(found, ValueError):
        newest, passed_over = found
        assert newest is not None or passed_over
        odd = [sentence for sentence in passed_over if not sentence.isprintable() or str(root) not in sentence]
        assert not odd, odd
    chosen = verdict(lambda: chosen_checkpoint(root, "step-3", lambda line: None), folder)
    verdict(lambda: chosen_checkpoint(root, "best", lambda line: None), folder)
    opened = verdict(lambda: open_state(root / "step-3"), folder)
    if not isinstance(chosen, ValueError):
        assert not isinstance(opened, ValueError), opened
        state, tensors = opened
        assert state == STATE
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@few_and_many(25)
def test_manifest_of_a_checkpoint(tmp_path: Path, examples: int) -> None:
    path = checkpoint(tmp_path) / "manifest.json"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        assert_as_written(tmp_path)

    fuzz(check, changed_file(json.loads(path.read_text())), examples)


@few_and_many(25)
def test_part_of_a_checkpoint(tmp_path: Path, examples: int) -> None:
    path = next(checkpoint(tmp_path).glob("*.safetensors"))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        assert_as_written(tmp_path)

    fuzz(check, changed_bytes(path.read_bytes()), examples)


@few_and_many(40)
@pytest.mark.parametrize(("name", "read"), [("finished.json", finished_step), ("stopped.json", stopped_step)])
def test_markers_of_a_run(tmp_path: Path, examples: int, name: str, read: Any) -> None:
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        step = verdict(lambda: read(tmp_path), tmp_path)
        assert isinstance(step, ValueError) or (type(step) is int and step >= 0)

    fuzz(check, changed_file({"step": 12, "loss": 2.5, "seconds": 1.0}), examples)


YAML_SNIPPETS = [
    *(
        "&a [*a]",
        "*x",
        "!!python/object:os.system ls",
        "<<: {a: 1}",
        "? [a]\n: b",
        "[" * 2000,
        "{a: " * 500,
        "a: " * 300,
    ),
    *(
        "9" * 5000,
        "1e999999",
        ".nan",
        ".inf",
        "0x" + "f" * 5000,
        "'\\ud800'",
        '"\\ud800"',
        '"\\x00"',
        "\t",
        "- ",
        "|\n",
    ),
    *("%YAML 1.1\n---\n", "---\n", "...\n", "null", "[]", "{}", "1e400", "-1", "0", "''", '"a\\nb"', "\u2028", "\x85"),
    *("'" + "x" * 70_000 + "'", "yes", "2026-11-28", "1:30", "0o9", "1_000_", "- - - -"),
]


@st.composite
def changed_yaml(draw: st.DrawFn, valid: str) -> bytes:
    """`valid` with values, keys or whole lines replaced."""
    lines = valid.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        change = draw(st.sampled_from(["value", "value", "line", "drop", "repeat", "indent"]))
        snippet = draw(st.sampled_from(YAML_SNIPPETS))
        if change == "value":
            key, colon, _ = lines[at].rpartition(": ")
            lines[at] = f"{key}{colon}{snippet}"
        elif change == "line":
            lines[at] = snippet
        elif change == "drop":
            lines[at] = ""
        elif change == "repeat":
            lines.insert(at, lines[at])
        else:
            lines[at] = " " * draw(st.integers(1, 5)) + lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@few_and_many(40)
@pytest.mark.parametrize("which", ["tiny", "effective"])
def test_recipe(tmp_path: Path, examples: int, which: str) -> None:
    written = (ROOT / "recipes/tiny.yaml").read_text()
    if which == "effective":
        claim(tmp_path / "run", load_recipe(ROOT / "recipes/tiny.yaml")).release()
        written = (tmp_path / "run/recipe.yaml").read_text()
    path = tmp_path / "changed.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        recipe = verdict(lambda: load_recipe(path), path)
        if not isinstance(recipe, ValueError):
            assert recipe.train.steps > 0

    fuzz(check, st.one_of(changed_yaml(written), changed_yaml(written), changed_bytes(written.encode())), examples)


@few_and_many(30)
def test_recipe_of_a_run(tmp_path: Path, examples: int) -> None:
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", [f"output.dir={tmp_path}"])
    folder = tmp_path / "tiny"
    claim(folder, recipe).release()
    written = (folder / "recipe.yaml").read_text()

    def check(content: bytes) -> None:
        (folder / "recipe.yaml").write_bytes(content)
        verdict(lambda: check_folder(folder, recipe), folder)

    fuzz(check, st.one_of(changed_yaml(written), changed_bytes(written.encode())), examples)


SET = [
    "train.steps",
    "optim.lr",
    "model.path",
    "data.train",
    "name",
    "lora",
    "lora.targets",
    "monitor",
    "",
    ".",
    "a..b",
]


@few_and_many(40)
def test_override(examples: int) -> None:
    def check(override: str) -> None:
        verdict(lambda: load_recipe(ROOT / "recipes/tiny.yaml", [override]), None)

    keys = st.one_of(st.sampled_from(SET), st.text(max_size=5))
    values = st.one_of(st.sampled_from(YAML_SNIPPETS), st.text(max_size=5))
    fuzz(check, st.builds(lambda key, sign, value: key + sign + value, keys, st.sampled_from("= ="), values), examples)


@few_and_many(40)
def test_hostfile(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "hosts"
    odd = [
        "node1 slots=8",
        "user@node2 slots=4",
        "# x",
        "node1 slots=0",
        "slots=8",
        "node3 slots=" + "9" * 5000,
        "-oX slots=1",
    ]
    texts = st.lists(st.one_of(st.sampled_from(odd), st.text(max_size=12)), max_size=5).map("\n".join)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        hosts = verdict(lambda: read_hostfile(path), path)
        if not isinstance(hosts, ValueError):
            assert all(host.slots > 0 and not host.name.startswith("-") for host in hosts)

    valid = changed_bytes(b"node1 slots=8\nnode2 slots=8\n")
    fuzz(check, st.one_of(valid, texts.map(lambda text: text.encode("utf-8", "surrogatepass"))), examples)


LINES: list[dict[str, Any]] = [
    {"kind": "start", "step": 0, "recipe": "tiny"},
    {"kind": "eval", "step": 0, "loss": 2.8, "tokens": 100, "parts": [[2.0, 50], [3.0, 50]]},
    {"kind": "train", "step": 1, "loss": 2.7, "tokens": 100, "lr": 1e-3},
    {"kind": "finding", "step": 1, "level": "alert", "rule": "r", "layer": 3, "message": "layer 3"},
    {"kind": "checkpoint", "step": 2, "path": "checkpoints/step-2", "seconds": 0.1, "blocked_seconds": 0.1},
    {"kind": "eval", "step": 2, "loss": 2.5, "tokens": 100, "parts": [[1.9, 50], [2.8, 50]]},
    {"kind": "end", "step": 2},
]


@few_and_many(40)
def test_metrics(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "tiny" / "metrics.jsonl"
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", [f"output.dir={tmp_path}"])
    claim(tmp_path / "tiny", recipe).release()

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        lines = [json.dumps(line).encode() for line in LINES]
        at = draw(st.integers(0, len(LINES) - 1))
        lines[at] = draw(changed_file(LINES[at]))
        return b"\n".join(lines) + draw(st.sampled_from([b"\n", b"", b"\n\n"]))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = verdict(lambda: read_metrics(path), path)
        verdict(lambda: print_summary(tmp_path / "tiny"), path)
        if not isinstance(found, ValueError):
            assert all(isinstance(line["kind"], str) for line in found)
        MetricsFile(path).close()

    fuzz(check, changed(), examples)


@few_and_many(40)
def test_routing_snapshot(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "step-00000004.npz"
    write_snapshot(path, RoutingSnapshot(4, (0, 1), np.arange(16).reshape(2, 8), 60))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = verdict(lambda: read_snapshot(path), path)
        if not isinstance(found, ValueError):
            assert found.counts.shape[0] == len(found.layers)

    fuzz(check, changed_bytes(path.read_bytes()), examples)


@few_and_many(40)
def test_kept_step(tmp_path: Path, examples: int) -> None:
    facts = {"step": 4, "base": "2-abc", "seed": 0}
    (tmp_path / "step.json").write_text(json.dumps(facts))
    tensors = {name: torch.zeros(1, 1, 1, 4, dtype=torch.int64) for name in ("input_ids", "labels", "segment_ids")}
    tensors |= {"packs": torch.zeros(1, 1, 1, dtype=torch.int64), "loss_sums": torch.zeros(1, 1, 1)}
    valid = save(tensors)
    (tmp_path / "batches.safetensors").write_bytes(valid)

    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        verdict(lambda: read_step(tmp_path), tmp_path)
        (tmp_path / name).write_bytes(kept)

    fuzz(
        check,
        st.one_of(
            st.tuples(st.just("step.json"), changed_file(facts)),
            st.tuples(st.just("batches.safetensors"), changed_bytes(valid)),
        ),
        examples,
    )


def test_a_copy_of_a_whole_checkpoint_is_read(tmp_path: Path) -> None:
    """The fuzz would pass if everything were refused."""
    checkpoint(tmp_path)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy" / "checkpoints")
    assert_as_written(tmp_path / "copy")
    assert newest_checkpoint(tmp_path / "copy" / "checkpoints")[1] == []
