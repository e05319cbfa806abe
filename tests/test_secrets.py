"""A recipe that holds a key is refused, and no message repeats the key."""

import re
from pathlib import Path

import pytest

from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe, RecipeError
from tests.commands import ROOT

TINY = ROOT / "recipes/tiny.yaml"
LETTERS = "aB3dE6gH9jK2mN5pQ8rS1tU4vW7xY0zAbCdEfGhI"
HEX = "0123456789abcdef0123456789abcdef01234567"


def read(*overrides: str) -> Recipe:
    return load_recipe(TINY, overrides)


SECRETS = {
    f"hf_{LETTERS[:34]}": "a Hugging Face token; .* environment as HF_TOKEN instead",
    f"wandb_v1_{LETTERS}": "a W&B key; .* environment as WANDB_API_KEY instead",
    f"sk-proj-{LETTERS}": "an API key; .* environment instead",
    f"sk-ant-api03-{LETTERS}": "an API key",
    f"ghp_{LETTERS[:36]}": "a GitHub token",
    f"github_pat_{LETTERS}": "a GitHub token",
    f"glpat-{LETTERS[:20]}": "a GitLab token",
    "AKIAIOSFODNN7EXAMPLE": "an AWS key",
    f"AIza{LETTERS[:35]}": "a Google key",
    "xoxb-123456789012-abcdefghij": "a Slack token",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{LETTERS}": "a JSON web token",
    "https://me:pass-word@host/rows.jsonl": "a password in an address",
}


@pytest.mark.parametrize(
    "key", ["name", "monitor.project", "model.path", "data.train.0.path", "output.dir", "optim.lr"]
)
@pytest.mark.parametrize("secret", SECRETS)
def test_a_value_that_looks_like_a_secret_is_refused_and_not_repeated(key: str, secret: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(f"{key}={secret}")
    (line,) = str(error.value).splitlines()
    assert re.search(f"{re.escape(key)}: looks like {SECRETS[secret]}", line)
    assert "a recipe is copied into the run folder, to W&B and into checkpoints" in line
    hidden = "me:pass-word" if "me:pass-word" in secret else secret
    assert hidden not in line
    assert hidden[4:16] not in line


def test_a_key_of_wandb_without_a_prefix_is_known_where_no_commit_is_written() -> None:
    for setting in ("monitor.project", "monitor.wandb"):
        with pytest.raises(RecipeError, match=rf"{re.escape(setting)}: looks like a W&B key; ") as error:
            read(f"{setting}={HEX}")
        assert HEX not in str(error.value)
    assert read(f"name={HEX}").name == HEX


@pytest.mark.parametrize("key", ["wandb_api_key", "model.hf_token", "monitor.password", "data.train.0.secret"])
def test_a_key_that_names_a_secret_is_refused_without_its_value(key: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(f"{key}=correct horse battery")
    (line,) = str(error.value).splitlines()
    assert f"{key}: no recipe holds secrets: a recipe is copied into" in line
    assert "horse" not in line


def test_a_secret_in_the_file_is_named_by_its_line(tmp_path: Path) -> None:
    secret = f"hf_{LETTERS[:34]}"
    (tmp_path / "mine.yaml").write_text(TINY.read_text() + f"output:\n  dir: runs/{secret}\n  drr: 1\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "mine.yaml")
    first, second = str(error.value).splitlines()
    assert re.search(r"mine\.yaml:\d+: output\.dir: looks like a Hugging Face token", first)
    assert "output.drr: unknown key" in second
    assert secret not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.path", f"models--Qwen--Qwen3-Coder-Next/snapshots/{HEX}"),
        ("output.dir", "sk-learn-classification-examples-v2"),
        ("name", "hf_finetune"),
        ("name", "task-sk-something-quite-long-as-a-name"),
        ("monitor.project", "tokens-and-keys"),
    ],
)
def test_what_only_resembles_a_secret_is_taken(key: str, value: str) -> None:
    load_recipe(TINY, [f"{key}={value}"], check_paths=False)
