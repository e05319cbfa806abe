"""Text never becomes a control token, and ids are those that transformers gives."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from data.chat import ChatTemplate
from data.sources import DataError
from data.token_ids import check_rows, token_ids
from data.tokenizer import (
    JSON_FILES,
    OTHER_CONTROL_TOKENS,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    TEXT_FILES,
    load_tokenizer,
    main,
)

ROOT = Path(__file__).parent.parent
BASE = ROOT / "recipes" / "base"
CORPUS = ROOT / "data" / "corpus"
CONTROL = SPECIAL_TOKENS + OTHER_CONTROL_TOKENS
TEXTS = [
    "def f(x: int) -> int:\n\treturn x + 12345\n\n\n    # done\r\n",
    "It's naïve; “quotes”, 日本語, emoji 🙂🏽, Å (angstrom), \u00a0nbsp",
    "",
    " ",
    "\n\n  \n",
]


@pytest.fixture(scope="module")
def ours():
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(BASE)


def test_committed_tokenizer_is_the_one_that_the_corpus_gives(tmp_path):
    main(["--corpus", str(CORPUS / "code-train.jsonl.gz"), "--to", str(tmp_path)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((BASE / name).read_text())
    assert (tmp_path / "chat_template.jinja").read_text() == (BASE / "chat_template.jinja").read_text()


def test_control_tokens_take_the_last_ids_in_qwens_order(ours, theirs):
    assert len(CONTROL) == 26
    assert [ours.control_id(token) for token in CONTROL] == list(range(4070, 4096))
    assert theirs.convert_tokens_to_ids(list(CONTROL)) == list(range(4070, 4096))
    assert ours.vocab_size == len(theirs) == 4096
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id) == (4072, 4070)
    assert ours.document_id == 4070
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    assert SPLIT_PATTERN == PRETOKENIZE_REGEX


def test_plain_ids_equal_transformers_on_text_without_control_tokens(ours, theirs):
    with gzip.open(CORPUS / "code-heldout.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = TEXTS + [json.loads(line)["text"] for line in file][:8]
    expected = theirs(texts).input_ids
    assert ours.encode_plain_batch(texts) == expected
    assert [ours.encode_plain(text) for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == [
        theirs.backend_tokenizer.normalizer.normalize_str(t) for t in texts
    ]


@pytest.mark.parametrize("token", CONTROL)
def test_a_control_token_in_text_stays_text(ours, theirs, token):
    text = f"print('{token}')"
    ids = ours.encode_plain(text)
    assert not set(ids) & set(ours.control_ids.values())
    assert ours.decode(ids) == text
    assert ours.control_id(token) in theirs(text).input_ids  # what the plain backend is there to prevent


def test_control_pattern_prefers_the_longer_token(ours):
    pieces = ours.control_pattern.split("a<|im_end|>b</tool_call><tool_call>")
    assert pieces == ["a", "<|im_end|>", "b", "</tool_call>", "", "<tool_call>", ""]


def test_fingerprint_follows_what_changes_ids_and_survives_a_save(tmp_path, ours, theirs):
    theirs.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    changed = shutil.copytree(BASE, tmp_path / "changed", ignore=shutil.ignore_patterns("*.safetensors"))
    (changed / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(changed).fingerprint != ours.fingerprint


def test_embedded_template_writes_chatml_and_refuses_what_it_cannot_say(theirs):
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": " U\n"}]
    text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n U\n<|im_end|>\n<|im_start|>assistant\n"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(TemplateError, match="no tools"):
        theirs.apply_chat_template(turns, tools=[tool], tokenize=False)
    with pytest.raises(TemplateError, match="no role tool"):
        theirs.apply_chat_template([*turns, {"role": "tool", "content": "x"}], tokenize=False)


def broken(folder: Path, name: str, text: str | None) -> Path:
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, r"no tokenizer\.json; copy the tokenizer files"),
        ("tokenizer.json", "{", r"tokenizer\.json:1:2: not JSON"),
        ("tokenizer_config.json", "{\n]", r"tokenizer_config\.json:2:1: not JSON"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_one_sentence(tmp_path, name, text, message):
    folder = broken(tmp_path / "model", name, text)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; point model\.path"):
        load_tokenizer(tmp_path / "nowhere")


def test_an_unknown_control_token_is_named(ours):
    with pytest.raises(DataError, match=r"base: no control token '<\|stop\|>'"):
        ours.control_id("<|stop|>")


def edited(folder: Path, **changes: object) -> Path:
    """A copy of the embedded tokenizer; `FILE__json=value` replaces a file, with a function it changes its object."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, change in changes.items():
        path = folder / name.replace("__", ".")
        value = json.loads(path.read_text()) if path.exists() else {}
        if callable(change):
            change(value)
        path.write_text(json.dumps(value if callable(change) else change))
    return folder


def added(content: str, number: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


STOP = {"eos_token": "<|stop|>"}


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"tokenizer__json": lambda v: v["added_tokens"].append(added("<|a|>", 4096))}, "1 token(s): '<|a|>' (4,096)"),
        ({"tokenizer__json": lambda v: v["added_tokens"].append(added("<|a|>", 5000))}, "1 token(s): '<|a|>' (5,000)"),
        ({"tokenizer_config__json": lambda v: v.update(STOP)}, "1 token(s): '<|stop|>' (4,096)"),
        (
            {"tokenizer_config__json": lambda v: v.update(additional_special_tokens=["<|a|>", "<|b|>"])},
            "2 token(s): '<|a|>' (4,096), '<|b|>' (4,097)",
        ),
        (
            {"tokenizer_config__json": lambda v: v["added_tokens_decoder"].update({"9000": added("<|a|>", 0)})},
            "1 token(s): '<|a|>' (4,096)",
        ),
        (
            {"special_tokens_map__json": STOP, "tokenizer_config__json": lambda v: v.pop("added_tokens_decoder")},
            "1 token(s): '<|stop|>' (4,096)",
        ),
        (
            {"added_tokens__json": {"<|q|>": 4096}, "tokenizer_config__json": lambda v: v.pop("added_tokens_decoder")},
            "1 token(s): '<|q|>' (4,096)",
        ),
        (
            {"tokenizer_config__json": lambda v: v.update(extra_special_tokens=[f"<|{i}|>" for i in range(9)])},
            "9 token(s): '<|0|>' (4,096), '<|1|>' (4,097), '<|2|>' (4,098), '<|3|>' (4,099), '<|4|>' (4,100), 4 more",
        ),
    ],
    ids=["added", "gap", "eos", "extra", "decoder", "map", "older", "many"],
)  # fmt: skip
def test_tokens_without_a_row_are_named_from_the_files_alone(tmp_path, changes, tokens):
    folder = edited(tmp_path / "model", **changes)
    for check in (lambda: check_rows(token_ids(folder), 4096, folder), lambda: load_tokenizer(folder, 4096)):
        with pytest.raises(DataError) as caught:
            check()
        assert str(caught.value) == (
            f"{folder}: the embedding has 4,096 rows (vocab_size of config.json), which is too few for {tokens}; use"
            " the tokenizer of this checkpoint, or add rows to the model first (resize_token_embeddings of"
            " transformers)"
        )
    # What the files alone say is what transformers makes of them, but for tokens that it drops.
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert theirs.items() <= token_ids(folder).items()
    load_tokenizer(folder, 10_000)


def test_a_tokenizer_with_fewer_tokens_than_rows_is_right():
    """As released: rows beyond the last token are padding."""
    assert max(token_ids(BASE).values()) == 4095
    load_tokenizer(BASE, 4096)
    check_rows(token_ids(BASE), 151_936, BASE)
    with pytest.raises(DataError, match=r"too few for 1 token\(s\): '</think>' \(4,095\); use"):
        check_rows(token_ids(BASE), 4095, BASE)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("tokenizer.json", b'{"a":' * 100_000, "nested more than 100 deep"),
        ("tokenizer.json", b"[1]", "holds a list where an object is expected"),
        ("tokenizer.json", b'{"a": "\xff"}', "tokenizer.json:1: not UTF-8"),
        ("tokenizer.json", b"{}", "transformers cannot read this tokenizer ("),
        ("tokenizer.json", b'{"version": "1.0", "model": 5}', "transformers cannot read this tokenizer ("),
        ("tokenizer_config.json", b'{"model_max_length": ' + b"9" * 5000 + b"}", "holds a number of 5,000 digits"),
        ("tokenizer_config.json", b'{"eos_token": 5}', "transformers cannot read this tokenizer (TypeError: "),
        ("tokenizer_config.json", b'{"tokenizer_class": 7}', "transformers cannot read this tokenizer ("),
        (
            "tokenizer_config.json",
            b'{"eos_token": "<|im_end|>", "chat_template": 5}',
            "its chat_template is a number, not",
        ),
        ("special_tokens_map.json", b"[", "not JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8 (byte 0)"),
        ("config.json", b"[]", "holds a list where an object is expected"),
    ],
)
def test_tokenizer_files_of_odd_types_are_one_sentence(tmp_path, name, contents, message):
    folder = edited(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()  # else it is the one that counts
    (folder / name).write_bytes(contents)
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_labels", "depth"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_transformers_would_list_for_hours_is_named_at_once(tmp_path, key, nested):
    def change(config):
        (config.setdefault("text_config", {}) if nested else config)[key] = 10**9

    folder = edited(tmp_path / "model", config__json=change)
    with pytest.raises(DataError, match=rf"config\.json: {key} is 1000000000; it must be at most 10,000$"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", [*JSON_FILES, *TEXT_FILES, "additional_chat_templates/tools.jinja"])
def test_a_fifo_among_the_tokenizer_files_is_named_at_once(tmp_path, name):
    path = edited(tmp_path / "model") / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{re.escape(name)}: is a FIFO, not a regular file"):
        load_tokenizer(tmp_path / "model")


def test_code_that_a_tokenizer_names_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    folder = edited(tmp_path / "model", tokenizer_config__json=lambda v: v.update(own))
    (folder / "own.py").write_text("raise SystemExit('was run')\n")
    load_tokenizer(folder)  # transformers has a class of its own for this model
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"transformers cannot read this tokenizer \(ValueError"):
        load_tokenizer(folder)


def test_a_chat_template_with_tokens_of_another_family_is_named(tmp_path):
    folder = edited(tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|eot_id|>"))
    with pytest.raises(DataError, match=r"model: the chat template writes <\|eot_id\|>, which is no token of the tok"):
        ChatTemplate(load_tokenizer(folder))
    ChatTemplate(load_tokenizer(BASE))
