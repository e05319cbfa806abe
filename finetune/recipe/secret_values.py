"""Detection of keys and tokens in recipes, which are copied to places that others can read.

The patterns are those documented by the issuers, each with its own prefix. An older W&B key has 40 hexadecimal digits,
like a commit hash; it is only detected in settings where a commit hash makes no sense.
"""

import re
from collections.abc import Iterator

from finetune.recipe.yaml_tree import Mistake, Node

# (pattern, what it matches, the environment variable for it).
FORMS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(form), what, variable)
    for form, what, variable in (
        (r"\bhf_[A-Za-z0-9]{20,}", "a Hugging Face token", "HF_TOKEN"),
        (r"\bwandb_v\d_[A-Za-z0-9_]{20,}", "a W&B key", "WANDB_API_KEY"),
        (r"\blocal-[0-9a-f]{40}\b", "a W&B key", "WANDB_API_KEY"),
        (r"\bsk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20,}", "an API key", ""),
        (r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})", "a GitHub token", ""),
        (r"\bglpat-[A-Za-z0-9_-]{16,}", "a GitLab token", ""),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", "an AWS key", ""),
        (r"\bAIza[A-Za-z0-9_-]{35}", "a Google key", ""),
        (r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}", "a Slack token", ""),
        (r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}", "a JSON web token", ""),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*", "a private key", ""),
        (r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)", "a password in an address", ""),
    )
)
_PLAIN_KEY = re.compile(r"\b[0-9a-f]{40}\b")
_KEYS_OF_WANDB = ("monitor.project", "monitor.wandb")
_NAMES = re.compile(r"(?:^|_)(?:api_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_SHORTEST = 8  # characters of a secret; a shorter word may occur in any sentence
WHY = "a recipe is copied into the run folder, to W&B and into checkpoints"


def secret_mistakes(tree: Node) -> Iterator[Mistake]:
    """One mistake for every value in the tree that looks like a secret."""
    for key, node in _scalars(tree, ""):
        text = str(node.value)
        for form, what, variable in FORMS:
            if form.search(text):
                yield Mistake(node.place, key, _sentence(what, variable))
                break
        else:
            if key in _KEYS_OF_WANDB and _PLAIN_KEY.search(text):
                yield Mistake(node.place, key, _sentence("a W&B key", "WANDB_API_KEY"))
            elif _NAMES.search(key.rpartition(".")[2]):
                yield Mistake(node.place, key, f"no recipe holds secrets: {WHY}; set them in the environment")


def without_secrets(text: str, tree: Node | None) -> str:
    """A message with secrets truncated: text that looks like one, and values of keys that name one."""
    for form, _, _ in FORMS:
        text = form.sub(lambda found: f"{found[0][:4]}...", text)
    for key, node in _scalars(tree, "") if tree is not None else ():
        value = str(node.value)
        named = _NAMES.search(key.rpartition(".")[2]) or (key in _KEYS_OF_WANDB and _PLAIN_KEY.search(value))
        if named and len(value) >= _SHORTEST:
            text = text.replace(value, f"{value[:4]}...")
    return text


def _sentence(what: str, variable: str) -> str:
    where = f" as {variable}" if variable else ""
    return f"looks like {what}; {WHY}, so set it in the environment{where} instead"


def _scalars(node: Node, key: str) -> Iterator[tuple[str, Node]]:
    if isinstance(node.value, dict):
        children = list(node.value.items())
    elif isinstance(node.value, list):
        children = [(str(place), child) for place, child in enumerate(node.value)]
    else:
        yield key, node
        return
    for name, child in children:
        yield from _scalars(child, f"{key}.{name}" if key else name)
