"""The checkpoint's tokenizer, and training of the small one for the embedded base model.

python -m data.tokenizer --corpus data/corpus/code-train.jsonl.gz --to recipes/base
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from data.sources import DataError
from data.token_ids import check_rows, read_part, token_ids
from monitoring.json_file import FileError, kind_of, read_bytes

END_OF_TURN = "<|im_end|>"
END_OF_DOCUMENT = "<|endoftext|>"
# Qwen's control tokens in Qwen's order: they have the last ids of the vocabulary, in ascending order.
SPECIAL_TOKENS = (
    *(END_OF_DOCUMENT, "<|im_start|>", END_OF_TURN, "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Control tokens that decoding with `skip_special_tokens` keeps.
OTHER_CONTROL_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
# Single digits, and at most one leading symbol with letters. Source: `tokenizer.json` of the Qwen2 and Qwen3 releases.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Every JSON file that AutoTokenizer may open.
JSON_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "config.json"),
)
TEXT_FILES = ("merges.txt", "chat_template.jinja")
VOCABULARY = 4096
MOST_LISTED = 10_000  # layers or labels of a model
MAX_TOKENS = 4096  # max_position_embeddings of recipes/base/config.json
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- raise_exception("this chat template has no tools: train a checkpoint whose own template renders them") }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] or message.tool_calls %}
        {{- raise_exception("this chat template has no tools and no role " ~ message.role) }}
    {%- endif %}
    {{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content ~ "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""


class Tokenizer:
    """A checkpoint's tokenizer in which text never becomes a control token; only `control_id` returns their ids."""

    def __init__(
        self,
        backend: Backend,
        *,
        end_of_turn: str,
        padding: str,
        chat_template: str | None,
        template_variables: dict[str, str],
        place: str,
    ) -> None:
        description = json.loads(backend.to_str())
        self.place = place
        self.chat_template = chat_template
        self.template_variables = template_variables
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in description["added_tokens"]}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = self.control_id(end_of_turn)
        self.pad_id = self.control_id(padding)
        self.document_id = self.control_id(END_OF_DOCUMENT)
        identity = [description["model"], description["added_tokens"], description["normalizer"]]
        identity += [description["pre_tokenizer"], end_of_turn, padding, chat_template, template_variables]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self.control_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._decoder = backend
        description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = Backend.from_str(json.dumps(description))

    def control_id(self, token: str) -> int:
        """The id of a control token.

        Raises:
            DataError: this tokenizer has no such control token.
        """
        if token not in self.control_ids:
            raise DataError(f"{self.place}: no control token {token!r}; use the tokenizer of a Qwen3-Next checkpoint")
        return self.control_ids[token]

    def control_token(self, token_id: int) -> str:
        """The control token with this id, which must exist."""
        return next(token for token, number in self.control_ids.items() if number == token_id)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text`; a control token in it is encoded as ordinary text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_plain` of many texts, on all cores unless TOKENIZERS_PARALLELISM is false."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens written out."""
        return self._decoder.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(folder: str | Path, rows: int | None = None) -> Tokenizer:
    """Load the tokenizer of the checkpoint in `folder` with transformers.

    Args:
        rows: number of rows of the model's embedding, checked against all tokens; None: not checked.

    Raises:
        DataError: no folder, no tokenizer in it, a required token is missing, or tokens exceed the embedding.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; point model.path at a folder that holds a checkpoint")
    if not any(os.path.lexists(folder / name) for name in ("tokenizer.json", "vocab.json")):
        raise DataError(f"{folder}: no tokenizer.json; copy the tokenizer files of the checkpoint into this folder")
    _check_files(folder)
    try:
        # Without `trust_remote_code=False` it asks on the terminal whether to run code of the folder, and waits.
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers has no own exception; transformers does not check types
        raise DataError(
            f"{folder}: transformers cannot read this tokenizer ({type(error).__name__}: {_one_line(error)}); copy the"
            " tokenizer files of the checkpoint again"
        ) from error
    if not theirs.is_fast:
        raise DataError(f"{folder}: no tokenizer.json; only tokenizers that have one are supported")
    if theirs.eos_token is None:
        raise DataError(
            f"{folder / 'tokenizer_config.json'}: eos_token is missing; Qwen3-Next checkpoints set {END_OF_TURN!r}"
        )
    if rows is not None:
        check_rows(token_ids(folder) | theirs.get_vocab(), rows, folder)
    template = theirs.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder}: its chat_template is {kind_of(template)}, not a text; copy the checkpoint's own")
    return Tokenizer(
        theirs.backend_tokenizer,
        end_of_turn=theirs.eos_token,
        padding=theirs.pad_token or END_OF_DOCUMENT,
        chat_template=template,
        template_variables={name: value for name, value in theirs.special_tokens_map.items() if isinstance(value, str)},
        place=str(folder),
    )


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> Backend:
    """Train a byte-level BPE of `vocabulary` entries with Qwen's splits, control tokens last. Deterministic."""
    controls = len(SPECIAL_TOKENS) + len(OTHER_CONTROL_TOKENS)
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - controls,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in OTHER_CONTROL_TOKENS])
    return backend


def save_tokenizer(backend: Backend, folder: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, the files AutoTokenizer needs."""
    folder = Path(folder)
    added = json.loads(backend.to_str())["added_tokens"]
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "errors": "replace",
        "model_max_length": MAX_TOKENS,
        "pad_token": END_OF_DOCUMENT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", backend.to_str(pretty=True) + "\n")
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    _write(folder / "chat_template.jinja", CHAT_TEMPLATE)


def _check_files(folder: Path) -> None:
    """Check that transformers will open only regular files, and only valid JSON.

    Raises:
        DataError: names the file.
    """
    for name in JSON_FILES:
        part = read_part(folder / name)
        if name == "config.json":
            _check_counts(part, folder / name)
    texts = [folder / name for name in TEXT_FILES]
    with suppress(OSError):  # no such folder
        texts += sorted((folder / "additional_chat_templates").iterdir())
    for path in texts:
        try:
            if os.path.lexists(path):
                read_bytes(path).decode("utf-8")
        except (FileError, UnicodeDecodeError) as error:
            told = str(error) if isinstance(error, FileError) else f"{path}: not UTF-8 (byte {error.start})"
            raise DataError(f"{told}; copy the tokenizer files of the checkpoint again") from None


def _check_counts(config: Mapping[str, Any], path: Path) -> None:
    """Make sure that no number makes transformers build a list for hours: its configurations have one a layer or label.

    Raises:
        DataError: names the key.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, path)
        elif type(value) is int and value > MOST_LISTED and any(word in key for word in ("layer", "label", "depth")):
            raise DataError(f"{path}: {key} is {value}; it must be at most {MOST_LISTED:,}")


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tokenizer", description="Trains the embedded tokenizer.")
    parser.add_argument("--corpus", type=Path, required=True, help=".jsonl.gz rows with a 'text' column")
    parser.add_argument("--to", type=Path, required=True, help="folder of the checkpoint that the tokenizer is for")
    options = parser.parse_args(arguments)
    with gzip.open(options.corpus, "rt", encoding="utf-8") as rows:
        backend = train_tokenizer(json.loads(row)["text"] for row in rows)
    save_tokenizer(backend, options.to)
    print(f"{options.to}: tokenizer of {backend.get_vocab_size()} entries")


if __name__ == "__main__":
    main(sys.argv[1:])
