"""Ids are those that inference sees, what is trained is what the model writes, and text never ends a turn."""

import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.chat import ChatTemplate, encode, pieces_of
from data.formats import Completion, Conversation, Text
from data.sources import DataError, RowError
from data.tokenizer import Tokenizer, load_tokenizer

BASE = Path(__file__).parent.parent / "recipes" / "base"
# Everything that templates in use do: tools, calls, shared tool turns, reasoning, loop controls, generation marks.
AGENT_TEMPLATE = """\
{%- if tools %}
    {{- "<|im_start|>system\\nTools:" }}
    {%- for tool in tools %}
        {{- "\\n" + (tool.function | tojson) }}
    {%- endfor %}
    {{- "\\nCall them inside <tool_call></tool_call>.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}
        {%- generation %}
        {%- if message.reasoning_content is defined %}
            {{- "<think>" + message.reasoning_content + "</think>" }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if not call.function %}{% continue %}{% endif %}
            {{- "\\n<tool_call>\\n" + (call.function | tojson) + "\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>" }}
        {%- endgeneration %}
        {{- "\\n" }}
    {%- elif message.role == "tool" %}
        {%- if messages[loop.index0 - 1].role != "tool" %}{{- "<|im_start|>user\\n" }}{%- endif %}
        {{- "<tool_response>" + message.content + "</tool_response>\\n" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- "<|im_end|>\\n" }}{%- endif %}
    {%- elif message.role in ["system", "user"] %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- else %}
        {{- raise_exception("no such role " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""
# Drops the reasoning of all turns but the last, as thinking templates do.
FORGETFUL_TEMPLATE = """\
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.role == "assistant" and loop.last %}{{- "<think></think>" }}{%- endif %}
    {{- message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""
TOOL = {
    "type": "function",
    "function": {"name": "run", "description": "Läuft <b>'x'</b>", "parameters": {"z": 1, "a": 2}},
}
WORDS = [
    "def f(x):\n",
    "    return",
    " x",
    "naïve ",
    "日本",
    "🙂",
    " <b>&'\"",
    "\\n",
    "12",
    "\t",
    "{{ x }}",
    "{% if %}",
    "a\n\nb",
    ".",
]


def with_template(template: str | None) -> Tokenizer:
    theirs = AutoTokenizer.from_pretrained(BASE)
    return Tokenizer(
        theirs.backend_tokenizer,
        end_of_turn="<|im_end|>",
        padding="<|endoftext|>",
        chat_template=template,
        template_variables={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        place="model",
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_template(AGENT_TEMPLATE)


@pytest.fixture(scope="module")
def theirs():
    theirs = AutoTokenizer.from_pretrained(BASE)
    theirs.chat_template = AGENT_TEMPLATE
    return theirs


def document(content, tokenizer: Tokenizer):
    template = ChatTemplate(tokenizer) if isinstance(content, Conversation) else None
    [pieces] = pieces_of([content], tokenizer, template)
    if isinstance(pieces, RowError):
        raise pieces
    return encode([pieces], tokenizer)[0]


def trained_text(content, tokenizer: Tokenizer) -> list[str]:
    """The trained runs, decoded."""
    found = document(content, tokenizer)
    borders = np.flatnonzero(np.diff(np.concatenate([[False], found.trained, [False]]).astype(int)))
    return [tokenizer.decode(found.ids[a:b]) for a, b in borders.reshape(-1, 2)]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def random_conversation(rng: random.Random) -> Conversation:
    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randrange(1, 9)))

    def call() -> dict:
        return {"type": "function", "function": {"name": "run", "arguments": {"x": text(), "y": [1, None, True]}}}

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(1, 5)):
        messages.append(user(text()))
        if rng.random() < 0.5:
            calls = [call() for _ in range(rng.randrange(1, 3))]
            messages.append(answer("x" + text(), tool_calls=calls))
            messages += [{"role": "tool", "content": text()} for _ in calls]
        more = {"reasoning_content": text()} if rng.random() < 0.3 else {}
        # An answer that begins with a newline is tokenised apart from the prompt's; see the test for it.
        messages.append(answer("x" + text(), **more))
    return Conversation(messages, [TOOL] if rng.random() < 0.5 else None)


def test_ids_and_mask_equal_transformers_on_random_conversations(tokenizer, theirs):
    rng = random.Random(0)
    conversations = [random_conversation(rng) for _ in range(150)]
    template = ChatTemplate(tokenizer)
    documents = encode(template.pieces(conversations), tokenizer)
    turns = 0
    for conversation, found in zip(conversations, documents, strict=True):
        expected = theirs.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert found.ids.tolist() == expected["input_ids"]
        assert found.trained.astype(int).tolist() == expected["assistant_masks"]
        turns += sum(message["role"] == "assistant" for message in conversation.messages)
    assert turns > 400


def test_the_rendered_text_equals_transformers_with_its_variables(theirs):
    source = (
        "{{ bos_token is defined }} {{ eos_token }} {{ pad_token }} {{ tools }} {{ {'é': '<'} | tojson }} "
        "{{ messages | tojson(indent=1) }} {{ documents is none }} {{ strftime_now('%Y') }} "
        "{{ add_generation_prompt }}\n"
        "{%- for m in messages %}\n  {{ loop.index0 }}{% break %}\n{%- endfor %}\n  {% set x = 1 %}\n tail"
    )
    messages = [user("<&>"), answer("A")]
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = source
    for prompt in (False, True):
        expected = theirs.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
        assert ChatTemplate(tokenizer).render(messages, None, prompt=prompt) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("Q"), answer("A")], ["A<|im_end|>"]),
        ([user("Q"), answer(" A\n"), user("R"), answer("B")], [" A\n<|im_end|>", "B<|im_end|>"]),
        ([user("Q"), answer("A"), answer("B"), user("R")], ["A<|im_end|>", "B<|im_end|>"]),
        ([user("Q"), answer("A", weight=0), user("R"), answer("B")], ["B<|im_end|>"]),
        ([user("Q"), answer("", reasoning_content="T")], ["<think>T</think><|im_end|>"]),
        (
            [user("Q"), answer("C", tool_calls=[{"function": {"name": "f", "arguments": {"a": "é"}}}])],
            ['C\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>'],
        ),
    ],
    ids=["one", "two", "in-a-row", "weight-0", "reasoning", "tool-call"],
)
def test_what_is_trained_is_the_turn_and_its_end_but_not_the_newline_after(tokenizer, messages, expected):
    assert trained_text(Conversation(messages), tokenizer) == expected


def test_turns_given_as_prompt_are_not_trained(tokenizer):
    messages = [user("Q"), answer("A"), user("R"), answer("B")]
    assert trained_text(Conversation(messages, first_trained=3), tokenizer) == ["B<|im_end|>"]


def test_an_answer_that_begins_with_a_newline_keeps_the_prompts_tokens(tokenizer, theirs):
    messages = [user("Q"), answer("\nA")]
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    found = document(Conversation(messages), tokenizer)
    assert found.ids[: len(prompt)].tolist() == prompt
    assert not found.trained[: len(prompt)].any()
    assert found.trained[len(prompt)]
    joined = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert found.ids.tolist() != joined  # there, one token covers the end of the prompt and the start of the answer
    assert tokenizer.decode(found.ids) == theirs.decode(joined)


CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<tool_call>",
    "</tool_response>",
    "<think>",
    "<|fim_middle|>",
]


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_written_in_a_row_stay_text(tokenizer, theirs, token):
    def conversation(text: str) -> Conversation:
        call = {"type": "function", "function": {"name": "f", "arguments": {text: [text]}}}
        tool = {"type": "function", "function": {"name": "f", "description": text}}
        said = text.replace("<think>", "think")  # an assistant may think; see below
        return Conversation(
            [user(text), answer(said), {"role": "tool", "content": text}, answer("", tool_calls=[call])], [tool]
        )

    def controls(conversation: Conversation) -> list[int]:
        return [i for i in document(conversation, tokenizer).ids.tolist() if i in tokenizer.control_ids.values()]

    if token == "<think>":
        tokenizer = with_template(AGENT_TEMPLATE.replace("<think>", "[").replace("</think>", "]"))
    injected = conversation(f"a {token}b{token}{token}")
    assert controls(injected) == controls(conversation("plain"))
    expected = theirs.apply_chat_template(injected.messages, tools=injected.tools, tokenize=False)
    assert tokenizer.decode(document(injected, tokenizer).ids) == expected


def test_a_row_may_use_private_characters(tokenizer):
    text = "\ue000<|im_end|>\ue001"
    found = document(Conversation([user(text), answer(text)]), tokenizer)
    assert tokenizer.decode(found.ids).count(text) == 2
    assert found.ids.tolist().count(tokenizer.eos_id) == 2


def test_an_assistants_thinking_is_control_tokens_where_the_template_thinks(tokenizer):
    think = tokenizer.control_id("<think>")
    conversation = Conversation([user("<think>"), answer("<think>T</think>A")])
    found = document(conversation, tokenizer)
    assert found.ids.tolist().count(think) == 1
    assert found.ids[found.trained][0] == think
    plain = document(conversation, load_tokenizer(BASE))
    assert think not in plain.ids


def test_a_template_that_rewrites_turns_is_refused_where_it_does(tokenizer):
    forgetful = with_template(FORGETFUL_TEMPLATE)
    assert trained_text(Conversation([user("Q"), answer("A")]), forgetful) == ["<think></think>A<|im_end|>"]
    with pytest.raises(RowError, match=r"messages\[1\]: the chat template renders the turns up to here differently"):
        document(Conversation([user("Q"), answer("A"), user("R"), answer("B")]), forgetful)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"^model: the checkpoint has no chat template; add chat_template\.jinja"),
        ("{{ messages[0].content }}", r"^model: the chat template knows no add_generation_prompt"),
        ("{% if add_generation_prompt %}\n{% fi %}", r"^model: chat template, line 2: .*fi"),
    ],
)
def test_a_template_that_cannot_train_is_refused(template, message):
    with pytest.raises(DataError, match=message):
        ChatTemplate(with_template(template))


@pytest.mark.parametrize(
    ("messages", "reason", "message"),
    [
        (
            [{"role": "critic", "content": "x"}, answer("A")],
            "chat template",
            r"refuses this row \(no such role critic\)",
        ),
        ([answer("A")], "bad message", r"messages\[0\]: the assistant speaks first"),
        ([user("Q"), answer("A", reasoning_content=3)], "chat template", "refuses this row"),
        ([user("Q"), answer("A", tool_calls=[{"function": {"a": object}}])], "chat template", "refuses this row"),
        ([user("\ud83d"), answer("A")], "not UTF-8", "half of a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_rendered_are_bad_rows(tokenizer, messages, reason, message):
    with pytest.raises(RowError, match=message) as caught:
        document(Conversation(messages), tokenizer)
    assert caught.value.reason == reason


def test_a_turn_without_an_end_is_refused():
    endless = with_template(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    with pytest.raises(RowError, match=r"messages\[1\]: the chat template ends the turn without a control token"):
        document(Conversation([user("Q"), answer("A")]), endless)


def test_the_sandbox_holds():
    escape = "{{ messages.append(1) }}{{ ''.__class__ }}{% if add_generation_prompt %}{% endif %}"
    with pytest.raises(RowError, match="refuses this row"):
        document(Conversation([user("Q"), answer("A")]), with_template(escape))


def test_text_and_completions_end_in_their_stop_token(tokenizer):
    text = document(Text("def f(): pass<|im_end|>"), tokenizer)
    assert text.ids[-1] == tokenizer.document_id
    assert text.trained.all()
    assert tokenizer.eos_id not in text.ids
    completion = document(Completion("Q: <|im_end|>\n", "A"), tokenizer)
    prompt = tokenizer.encode_plain("Q: <|im_end|>\n")
    assert completion.ids.tolist() == [*prompt, *tokenizer.encode_plain("A"), tokenizer.eos_id]
    assert completion.trained.tolist() == [False] * len(prompt) + [True, True]
    assert trained_text(Completion("", "A b"), tokenizer) == ["A b<|im_end|>"]
