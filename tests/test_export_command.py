"""`export` of a run: which recipe and base count, what the folder says about itself, and what is replaced."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune import cli
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.mark import MARK, About
from finetune.checkpoint.merged import export_merged
from finetune.commands.export import export_run
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import RecipeError
from finetune.run.folder import check_folder, recipe_of
from finetune.run.stored_recipe import recipe_state
from finetune.training.saving import _check_recipe
from monitoring.metrics import MetricsFile
from tests.checkpoints import write_checkpoint
from tests.commands import ROOT, Place, files, place, run_with_checkpoint

Q_PROJ = "model.layers.3.self_attn.q_proj.weight"
LAUNCHER = "launch.sh"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(here: Place, tmp_path: Path) -> Path:
    """A run folder with a checkpoint, which a test may change."""
    return Path(shutil.copytree(run_with_checkpoint(here, "of-exports"), tmp_path / "run"))


@pytest.fixture
def earlier(here: Place, tmp_path: Path) -> Path:
    """The same as an earlier version left it: the checkpoint holds no recipe."""
    made = run_with_checkpoint(here, "of-earlier-exports", recipe_in_state=False)
    return Path(shutil.copytree(made, tmp_path / "earlier"))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def set_state(run: Path, **changes: Any) -> None:
    """Write the checkpoint anew with another state."""
    checkpoint = run / "checkpoints/step-1"
    state = json.loads((checkpoint / "manifest.json").read_text())["state"]
    tensors = load_file(checkpoint / "part-00000.safetensors")
    write_checkpoint(run / "checkpoints", 1, tensors=tensors, state={**state, **changes})


def test_merged_export_adds_exactly_what_was_trained(here: Place, folder: Path, tmp_path: Path) -> None:
    assert export_run(folder, tmp_path / "merged", kind="merged") == 0
    base, merged = (load_file(path / "model.safetensors") for path in (here.folder / "base", tmp_path / "merged"))
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.lora is not None
    for name, tensor in base.items():
        if name == "model.layers.3.self_attn.q_proj.weight":
            tensor = tensor + recipe.lora.alpha  # alpha / rank x ones @ ones over rank: alpha everywhere
        assert torch.equal(merged[name], tensor), name


def test_a_run_on_other_base_weights_is_not_merged_into_these(here: Place, earlier: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(here.folder / "base", tmp_path / "base"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    edit(earlier / "recipe.yaml", str(here.folder / "base"), str(other))
    for kind in ("merged", "adapter"):
        with pytest.raises(CheckpointError, match="was trained on other base weights than"):
            export_run(earlier, tmp_path / "out", kind=kind)
        with pytest.raises(CheckpointError, match="was trained on other base weights than"):
            export_run(earlier, tmp_path / "out", kind=kind, base=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("missing", ": not the folder of a run (it holds no recipe.yaml)"),
        ("empty", ": holds no whole checkpoint to export; train it first"),
        (
            "damaged",
            "/checkpoints: none of its checkpoints is whole (step-1); put one back from a copy, or give this run"
            " another name (--set name=...) to begin at the first step",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_what_cannot_be_exported_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path, which: str, expected: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if which == "missing":
        folder = tmp_path / "nowhere"
    elif which == "empty":
        shutil.rmtree(folder / "checkpoints")
    else:
        (folder / "checkpoints/step-1/part-00000.safetensors").write_bytes(b"cut short")
    assert cli.main(["export", str(folder), "--to", str(tmp_path / "out"), "--format", kind]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"nextune: {folder}{expected}\n"
    assert ("step-1: passed over, part-00000.safetensors is 9 bytes" in captured.out) == (which == "damaged")
    assert not (tmp_path / "out").exists()


# The recipe of the run is that of the checkpoint.


@pytest.mark.parametrize("what", ["deleted", "edited", "broken"])
def test_recipe_yaml_is_for_people(folder: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "recipe.yaml"
    if what == "deleted":
        file.unlink()
    elif what == "edited":
        edit(file, "alpha: 16.0", "alpha: 999.0")
    else:
        file.write_text("model: [")
    assert recipe_of(folder).lora is not None
    assert recipe_of(folder).lora.alpha == 16.0  # type: ignore[union-attr]
    export_run(folder, tmp_path / "out", kind="adapter")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_alpha"] == 16
    said = {
        "deleted": "is missing",
        "edited": "was edited (lora.alpha was 16.0, is 999.0)",
        "broken": "is no longer a recipe",
    }[what]
    checkpoint = folder / "checkpoints/step-1"
    note = f"{file}: {said}; it changes nothing, because the recipe of {checkpoint} counts"
    assert f"note: {note}\n" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["deleted", "edited"])
def test_a_run_never_goes_on_with_another_recipe(here: Place, folder: Path, what: str) -> None:
    def now(**changes: Any) -> Any:
        return load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="of-exports", **changes)[1::2])

    if what == "deleted":
        (folder / "recipe.yaml").unlink()
    else:
        edit(folder / "recipe.yaml", "alpha: 16.0", "alpha: 999.0")
    assert ("is missing" if what == "deleted" else "was edited") in check_folder(folder, now())[0]
    check_folder(folder, now(optim__lr=1e-3))  # may change, as ever
    manifest = json.loads((folder / "checkpoints/step-1/manifest.json").read_text())
    for changes, said in (
        ({"lora__alpha": 999.0}, "lora.alpha was 16.0, is 999.0"),
        ({"optim__weight_decay": 0.3}, "optim.weight_decay was 0.0, is 0.3"),
    ):
        with pytest.raises(RecipeError) as refused:
            check_folder(folder, now(**changes))
        assert f"holds a run of another recipe ({said})" in str(refused.value)
        with pytest.raises(CheckpointError) as refused_at_resume:
            _check_recipe(now(**changes), manifest["state"], folder)
        assert f"belongs to a run of another recipe ({said}); undo the change" in str(refused_at_resume.value)
    _check_recipe(now(), manifest["state"], folder)


def test_a_checkpoint_of_an_earlier_version_needs_recipe_yaml(
    here: Place, earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(earlier, tmp_path / "out", kind="adapter")
    assert f"holds no recipe, written by an earlier version; it is read from {earlier}" in capsys.readouterr().out
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="of-earlier-exports")[1::2])
    assert check_folder(earlier, recipe) == []
    (earlier / "recipe.yaml").unlink()
    for use in (lambda: check_folder(earlier, recipe), lambda: export_run(earlier, tmp_path / "again", kind="adapter")):
        with pytest.raises(RecipeError, match="written by an earlier version, holds no recipe; put the file back"):
            use()


def test_a_recipe_in_a_manifest_is_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "checkpoints/step-1/manifest.json").read_text())
    values = manifest["state"]["recipe"]
    set_state(folder, recipe={**values, "lora": {**values["lora"], "alpha": 999.0}})
    with pytest.raises(CheckpointError, match="step-1: the recipe in its manifest was changed after it was written"):
        export_run(folder, tmp_path / "out", kind="merged")


@pytest.mark.parametrize("adapter", [{"rank": 8, "scaling": 4.0}, {"rank": 4, "scaling": 2.0}])
def test_rank_and_scale_are_those_that_were_trained(folder: Path, tmp_path: Path, adapter: dict[str, float]) -> None:
    set_state(folder, adapter={"rank": 8, "scaling": 2.0})
    export_run(folder, tmp_path / "out", kind="merged")
    set_state(folder, adapter=adapter)
    with pytest.raises(CheckpointError, match="but its recipe and factors say rank 8 and scale 2; export another"):
        export_run(folder, tmp_path / "again", kind="merged")


# The base of the run is found again, or named.


def test_a_base_that_was_named_relatively_is_found_from_anywhere(
    here: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here.folder)
    run = run_with_checkpoint(here, "relative", model__path="base")
    monkeypatch.chdir(tmp_path)
    assert recipe_of(run).model.path == str(here.folder / "base")
    assert f"path: {here.folder}/base\n" in (run / "recipe.yaml").read_text()
    export_run(run, tmp_path / "out", kind="adapter")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(here.folder / "base")
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="relative")[1::2])
    assert check_folder(run, recipe) == []  # the same folder by its absolute path


def test_a_base_that_has_moved_is_named_and_checked(here: Place, folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(here.folder / "base", tmp_path / "moved"))
    values = json.loads((folder / "checkpoints/step-1/manifest.json").read_text())["state"]["recipe"]
    set_state(folder, recipe=None)
    state = json.loads((folder / "checkpoints/step-1/manifest.json").read_text())["state"]
    del state["recipe"], state["recipe_sha256"]
    gone = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="of-exports")[1::2])
    gone = gone.model_copy(update={"model": gone.model.model_copy(update={"path": str(tmp_path / "gone")})})
    tensors = load_file(folder / "checkpoints/step-1/part-00000.safetensors")
    write_checkpoint(folder / "checkpoints", 1, tensors=tensors, state={**state, **recipe_state(gone)})
    assert values["model"]["path"] != str(tmp_path / "gone")
    with pytest.raises(CheckpointError) as refused:
        export_run(folder, tmp_path / "out", kind="adapter")
    assert str(refused.value) == (
        f"{tmp_path}/gone: no such folder; point at a checkpoint folder or a hub repository OWNER/NAME; the path is"
        f" model.path in {folder}/checkpoints/step-1; if the base is elsewhere now, add --base DIR"
    )
    arguments = ["export", str(folder), "--to", str(tmp_path / "out"), "--format", "adapter", "--base", str(moved)]
    assert cli.main(arguments) == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="of-exports")[1::2])
    assert check_folder(folder, recipe) is not None  # a folder that is gone may have moved: its fingerprint decides
    with pytest.raises(CheckpointError, match="nowhere: no such folder; give that of the base weights"):
        export_run(folder, tmp_path / "again", kind="adapter", base=tmp_path / "nowhere")


def test_a_hub_id_stays_one(here: Place, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="of-exports")[1::2])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "Someone/Base-80B"})})
    set_state(folder, **recipe_state(recipe))
    export_run(folder, tmp_path / "out", kind="adapter", base=here.folder / "base")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Someone/Base-80B"
    assert 'base_model: "Someone/Base-80B"\n' in (tmp_path / "out/README.md").read_text()


# What an export says about itself.


def test_the_card_is_of_the_fine_tune_and_that_of_the_base_stays_beside(
    here: Place, folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(here.folder / "base", tmp_path / "the-base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\nscore 99.9\n")
    (base / "LICENSE").write_text("as it was\n")
    metrics = MetricsFile(folder / "metrics.jsonl")
    for record in (
        {"kind": "start", "step": 0},
        {"kind": "eval", "step": 0, "loss": 3.0, "tokens": 20, "parts": [(30.0, 10), (30.0, 10)]},
        {"kind": "train", "step": 1, "loss": 2.5},
        {"kind": "eval", "step": 1, "loss": 2.0, "tokens": 20, "parts": [(20.0, 10), (20.0, 10)]},
        {"kind": "eval", "step": 2, "loss": 1.0, "tokens": 20, "parts": [(10.0, 10), (10.0, 10)]},
    ):
        metrics.write(record)
    metrics.close()
    amount = {"rows": 96, "documents": 96, "packs": 40, "tokens": 5000, "supervised_tokens": 2500}
    loader = {"data": "x", "seed": 0, "epoch": 0, "cursor": 8}
    set_state(folder, data={"train": amount, "eval": {**amount, "rows": 24}}, loader=loader)
    for kind in ("merged", "adapter"):
        out = tmp_path / kind
        export_run(folder, out, kind=kind, base=base)
        assert (out / "README.base.md").read_bytes() == (base / "README.md").read_bytes()
        assert (out / "LICENSE").read_bytes() == (base / "LICENSE").read_bytes()
        card = (out / "README.md").read_text()
        for said in (
            'license: "apache-2.0"\n',
            f'library_name: "{"peft" if kind == "adapter" else "transformers"}"\n',
            "# of-exports\n",
            "| licence of the base | apache-2.0 (`LICENSE`) |",
            "| trained | rank 8, alpha 16, dropout 0.1, on q_proj, k_proj,",
            "| checkpoint | step 1 of run of-exports |",
            "| training data | `train.jsonl`: 96 rows, 5,000 tokens, 50.0% of them supervised; seen 0.20 times |",
            "| held-out data | `heldout.jsonl`: 24 rows, 5,000 tokens, 50.0% of them supervised |",
            "| training loss, nats per token | 2.5000 at step 1 |",
            "| held-out loss, nats per token | 3.0000 before, 2.0000 after 1 steps; change -1.0000 with standard error",
            f"torch {torch.__version__}",
            "Its card is `README.base.md`.",
        ):
            assert said in card, said
        assert "99.9" not in card
        assert str(tmp_path) not in card
        assert str(here.folder) not in card
    again = tmp_path / "again"  # a fine-tune of a fine-tune keeps both cards
    shutil.copytree(tmp_path / "merged", tmp_path / "second-base")
    export_merged(
        tmp_path / "second-base",
        again,
        adapter=None,
        replaced={"model.norm.weight": torch.ones(32)},
        about=About("mine", {}),
    )
    assert (again / "README.md").read_text() == "mine"
    assert (again / "README.base.md").read_bytes() == (tmp_path / "merged/README.md").read_bytes()
    assert (again / "README.base.base.md").read_bytes() == (base / "README.md").read_bytes()
    assert (again / "nextune-export.base.json").read_bytes() == (tmp_path / "merged" / MARK).read_bytes()


def test_a_merged_folder_and_an_adapter_with_card_and_mark_load_as_ever(
    here: Place, folder: Path, tmp_path: Path
) -> None:
    export_run(folder, tmp_path / "merged", kind="merged")
    export_run(folder, tmp_path / "adapter", kind="adapter")
    ids = torch.arange(1, 18)[None]
    base = AutoModelForCausalLM.from_pretrained(here.folder / "base", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        assert (adapted - plain).abs().max() > 1e-3
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)


def test_the_mark_names_run_checkpoint_and_files(folder: Path, tmp_path: Path) -> None:
    export_run(folder, tmp_path / "out", kind="merged")
    mark = json.loads((tmp_path / "out" / MARK).read_text())
    assert mark["written_by"] == "python -m finetune export"
    assert (mark["run"], mark["checkpoint"], mark["step"]) == (str(folder), "step-1", 1)
    assert mark["checkpoint_sha256"] == json.loads((folder / "checkpoints/step-1/manifest.json").read_text())["sha256"]
    assert set(mark["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {MARK}


# What launch.sh exports is replaced; nothing else is.


def by_launcher(run: Path, to: Path) -> None:
    arguments = ["export", str(run), "--to", str(to), "--format", "merged", "--written-by", LAUNCHER]
    assert cli.main(arguments) == 0


def next_checkpoint(run: Path) -> None:
    tensors = load_file(run / "checkpoints/step-1/part-00000.safetensors")
    state = json.loads((run / "checkpoints/step-1/manifest.json").read_text())["state"]
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    write_checkpoint(run / "checkpoints", 2, tensors=doubled, state=state, keep=2)


def test_the_launchers_export_follows_the_run(
    here: Place, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = folder / "merged-by-launch"
    by_launcher(folder, to)
    first = files(to)
    by_launcher(folder, to)
    assert files(to) == first
    assert f"{to}: holds this checkpoint already\n" in capsys.readouterr().out
    next_checkpoint(folder)
    by_launcher(folder, to)
    grown = load_file(to / "model.safetensors")[Q_PROJ] - load_file(here.folder / "base/model.safetensors")[Q_PROJ]
    torch.testing.assert_close(grown, torch.full_like(grown, 4 * 16.0))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "checkpoints", "merged-by-launch", "recipe.yaml"]


@pytest.mark.parametrize("what", ["their own export", "a file beside", "a changed file", "a folder without a mark"])
def test_what_is_not_the_launchers_stays(
    folder: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    to = folder / "merged-by-launch"
    if what == "their own export":
        export_run(folder, to, kind="merged")
    elif what == "a folder without a mark":
        to.mkdir()
        (to / "thesis.txt").write_text("three years")
    else:
        by_launcher(folder, to)
        (to / ("model.gguf" if what == "a file beside" else "generation_config.json")).write_text("mine")
    before = files(to)
    next_checkpoint(folder)
    by_launcher(folder, to)
    assert files(to) == before
    out = capsys.readouterr().out
    assert f"note: {to}: " in out
    assert f"stays as it is; to export this run, name a folder of your own: python -m finetune export {folder}" in out


@pytest.mark.parametrize("to", ["", "/", ".", "{run}/checkpoints/step-9", "{run}"])
def test_a_place_that_is_not_free_is_refused_in_a_sentence(
    folder: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    assert cli.main(["export", str(folder), "--to", to.format(run=folder), "--format", "merged"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert files(folder) == before


def test_who_cannot_load_an_adapter_is_said(here: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"lora__targets": "[q_proj, experts]", "lora__dropout": "0.0"}
    run = run_with_checkpoint(here, "experts-too", **changes)
    export_run(run, tmp_path / "merged", kind="merged")
    assert "note:" not in capsys.readouterr().out
    export_run(run, tmp_path / "adapter", kind="adapter")
    assert "note: lora.targets: peft loads adapters of the routed experts, but not every" in capsys.readouterr().out
