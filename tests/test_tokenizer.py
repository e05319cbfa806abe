"""Text never becomes a control token, and ids are those that transformers gives."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from data.sources import DataError
from data.tokenizer import OTHER_CONTROL_TOKENS, SPECIAL_TOKENS, SPLIT_PATTERN, load_tokenizer, main

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
