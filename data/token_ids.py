"""The tokens of a checkpoint's tokenizer, read from its files, and whether the embedding has a row for each.

Source: what `AutoTokenizer` of transformers 5.24 adds to `tokenizer.json`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.sources import DataError
from monitoring.json_file import FileError, MissingFileError, read_object

_MOST_NAMED = 5
# Keys of `tokenizer_config.json` with one token or several; tokens that `tokenizer.json` lacks get the next ids.
_ONE = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SEVERAL = ("extra_special_tokens", "additional_special_tokens")


def token_ids(folder: Path) -> dict[str, int]:
    """The id of every token in the tokenizer files of `folder`, including added and special ones; empty if it has none.

    Raises:
        DataError: a file cannot be read.
    """
    description, config = (read_part(folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    model = description.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):  # another kind of tokenizer, which `load_tokenizer` checks
        return {}
    ids = {token: number for token, number in vocabulary.items() if type(number) is int}
    for token in _list(description.get("added_tokens")):
        if isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int:
            ids[token["content"]] = token["id"]
    following = max(ids.values(), default=-1) + 1
    for added in _further(config if "added_tokens_decoder" in config else {**config, **_older(folder)}):
        if added not in ids:
            ids[added] = following
            following += 1
    return ids


def check_rows(ids: Mapping[str, int], rows: int, folder: Path | str) -> None:
    """Check that the embedding has a row for every token.

    Args:
        rows: number of rows of the embedding.

    Raises:
        DataError: names the tokens without a row.
    """
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    if beyond:
        named = ", ".join(f"{token[:80]!r} ({number:,})" for number, token in beyond[:_MOST_NAMED])
        more = f", {len(beyond) - _MOST_NAMED:,} more" if len(beyond) > _MOST_NAMED else ""
        raise DataError(
            f"{folder}: the embedding has {rows:,} rows (vocab_size of config.json), which is too few for"
            f" {len(beyond):,} token(s): {named}{more}; use the tokenizer of this checkpoint, or add rows to the model"
            " first (resize_token_embeddings of transformers)"
        )


def read_part(path: Path) -> dict[str, Any]:
    """The object in one of the tokenizer's JSON files; empty if there is no such file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return read_object(path)
    except MissingFileError:
        return {}
    except FileError as error:
        raise DataError(f"{error}; copy the tokenizer files of the checkpoint again") from None


def _older(folder: Path) -> dict[str, Any]:
    """Tokens in two files that transformers reads only if `tokenizer_config.json` has no `added_tokens_decoder`."""
    added = read_part(folder / "added_tokens.json")
    numbered = {str(number): token for token, number in added.items() if type(number) is int}
    return {"added_tokens_decoder": numbered, **read_part(folder / "special_tokens_map.json")}


def _further(config: Mapping[str, Any]) -> Iterator[str]:
    """Tokens in `tokenizer_config.json`, in the order in which transformers adds them."""
    decoder = config.get("added_tokens_decoder")
    numbered = decoder.items() if isinstance(decoder, dict) else ()
    for _, token in sorted((int(number), token) for number, token in numbered if number.isdecimal()):
        yield from _content(token)
    for key in _ONE:
        yield from _content(config.get(key))
    for key in _SEVERAL:
        value = config.get(key)
        for token in value.values() if isinstance(value, dict) else _list(value):
            yield from _content(token)


def _content(token: Any) -> Iterator[str]:
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str):
        yield content


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
