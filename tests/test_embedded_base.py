"""The files of `recipes/base` say the same of the model: configuration, generation, tokenizer, template, weights."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

BASE = Path(__file__).resolve().parent.parent / "recipes" / "base"


def read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((BASE / name).read_text())
    return values


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def test_the_tokenizer_and_the_model_hold_as_many_tokens(tokenizer: Any) -> None:
    config = AutoConfig.from_pretrained(BASE, local_files_only=True)
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert len(tokenizer) == config.vocab_size
    assert max(tokenizer.get_vocab().values()) == config.vocab_size - 1


def test_the_ids_that_end_and_pad_are_those_of_the_tokenizer(tokenizer: Any) -> None:
    config, generation = read("config.json"), GenerationConfig.from_pretrained(BASE)
    end_of_turn, end_of_document = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert config["eos_token_id"] == tokenizer.eos_token_id == end_of_turn
    assert generation.eos_token_id == [end_of_turn, end_of_document]
    assert config["pad_token_id"] == generation.pad_token_id == tokenizer.pad_token_id == end_of_document
    # As in the released checkpoints: the models have one, and the tokenizers never write it.
    assert config["bos_token_id"] == generation.bos_token_id == end_of_document
    assert tokenizer.bos_token is None


def test_both_files_of_the_tokenizer_list_the_same_control_tokens(tokenizer: Any) -> None:
    listed = {int(number): token for number, token in read("tokenizer_config.json")["added_tokens_decoder"].items()}
    assert {token.pop("id"): token for token in read("tokenizer.json")["added_tokens"]} == listed
    special = {token["content"] for token in listed.values() if token["special"]}
    assert set(tokenizer.all_special_tokens) <= special
    assert set(read("tokenizer_config.json")["additional_special_tokens"]) < special


def test_the_template_writes_control_tokens_that_the_tokenizer_has(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": "x"} for role in ("system", "user", "assistant")],
        tokenize=False,
        add_generation_prompt=True,
    )
    controls = re.findall(r"<\|[a-z_]+\|>", text)
    assert controls == ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"]
    assert all(len(tokenizer.encode(control, add_special_tokens=False)) == 1 for control in controls)
    assert text.count(tokenizer.eos_token) == 3


def test_the_weights_and_the_readme_have_the_sizes_of_the_configuration() -> None:
    config = read("config.json")
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        dtypes = {weights.get_slice(name).get_dtype() for name in shapes}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == [config["vocab_size"], 128]
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")}
    assert layers == set(range(config["num_hidden_layers"]))
    assert (config["torch_dtype"], dtypes & {"BF16"}) == ("bfloat16", {"BF16"})
    count = sum(math.prod(shape) for shape in shapes.values())
    assert f"{count:,} parameters" in (BASE / "README.md").read_text()


def test_the_tables_of_the_corpus_and_of_the_base_count_what_there_is() -> None:
    corpus = BASE.parent.parent / "data" / "corpus"
    table = (corpus / "README.md").read_text()
    for path in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(path) as rows:
            assert f"| `{path.name}` | {sum(1 for _ in rows):,} |" in table
