"""Pages of the documentation site made from other files: README and its kin, the recipe keys, every module."""

import re
import sys
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.recipe.load import explain  # noqa: E402  # needs the checkout on the path

PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "recipes/base/README.md": "base-model.md",
}


def page(source: str) -> str:
    """The text of a file of the checkout, its links to other files as links between pages."""

    def link(found: re.Match[str]) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        target = PAGES.get(path) or path.removeprefix("docs/")
        return f"]({target}{anchor})"

    text = (ROOT / source).read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:)(?P<path>[\w./-]+?)(?P<anchor>#[\w-]+)?\)", link, text)


for source, target in PAGES.items():
    with mkdocs_gen_files.open(target, "w") as file:
        file.write(page(source))

with mkdocs_gen_files.open("keys.md", "w") as file:
    file.write(f"# Recipe keys\n\nWhat `python -m finetune keys` prints.\n\n```\n{explain()}\n```\n")

lines = []
for path in sorted(path for package in ("finetune", "data", "monitoring") for path in (ROOT / package).rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if path.name in ("__main__.py", "train.py") or "data/corpus" in path.as_posix():
        continue
    name = name.removesuffix(".__init__")
    with mkdocs_gen_files.open(f"reference/{name}.md", "w") as file:
        file.write(f"# {name}\n\n::: {name}\n")
    lines.append(f"* [{name}]({name}.md)\n")
with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as file:
    file.writelines(lines)
