"""Models with their own chat template: the rules of Qwen3's, written short, and templates that break them."""

import asyncio
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import Engine, Scene
from tiny import CORPUS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.attempt import Rules
from trimtab.rollout.formats.template import TemplateChat, TemplateConversation
from trimtab.rollout.play import play_group
from trimtab.rollout.types import Sampling

SHOWN = "loop.index0 > last.user and (loop.last or m.reasoning_content)"
TEMPLATE = """
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if SHOWN %}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
QWEN = TEMPLATE.replace("SHOWN", SHOWN)
OPENED = QWEN.replace("{%- if not enable", "{{- '<think>\\n' if enable_thinking }}{%- if not enable")
"""The prompt opens the reasoning, as for a model that always thinks."""
ALWAYS = QWEN.replace(
    "{%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}", "{{- '<think>\\n' }}"
)


def chat_of(template: str) -> TemplateChat:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    special, marks = ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), ("<think>", "</think>", "<tool_call>")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*marks, "</tool_call>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    return TemplateChat(fast)


CHAT, OPENED_CHAT = chat_of(QWEN), chat_of(OPENED)
SYSTEM, ASK, RESULT, AGAIN = Message("system", "S"), Message("user", "Q"), Message("tool", "5"), Message("user", "And?")
CALL = Message("assistant", "Wait.", reasoning="look", tool_calls=(ToolCall("get", {"k": "a", "n": 2}),))
ANSWER = Message("assistant", "15", reasoning="add")
CALL_TEXT = 'Wait.\n<tool_call>\n{"name": "get", "arguments": {"k": "a", "n": 2}}\n</tool_call><|im_end|>'
RESULT_TEXT = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
OPENING = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def sampled(message: Message, thinking: bool = True, chat: TemplateChat = CHAT) -> tuple[int, ...]:
    return chat.encode_assistant(message if thinking else replace(message, reasoning=""), thinking=thinking)


def test_tool_results_keep_the_reasoning_and_extend_what_was_sampled():
    conversation = TemplateConversation(CHAT, (SYSTEM, ASK), thinking=True)
    assert CHAT.decode(conversation.prompt_ids()) == "<|im_start|>system\nS<|im_end|>\n" + OPENING
    spelt = [i for letter in "look" for i in CHAT.encode(letter)]
    said = (*CHAT.encode("<think>"), *spelt, *CHAT.encode("</think>" + CALL_TEXT))  # no newlines: not as rendered
    before = conversation.prompt_ids()
    assert conversation.add_sampled(said) == CALL
    conversation.add([RESULT])
    assert conversation.prompt_ids() == before + said + CHAT.encode(RESULT_TEXT)


def test_a_user_message_drops_the_reasoning_and_keeps_calls_results_and_answers():
    conversation = TemplateConversation(CHAT, (ASK,), thinking=True)
    conversation.add_sampled(sampled(CALL))
    conversation.add([RESULT])
    conversation.add_sampled(sampled(ANSWER))
    conversation.add([AGAIN])
    assert CHAT.decode(conversation.prompt_ids()) == (
        f"{OPENING}{CALL_TEXT}{RESULT_TEXT}15<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert conversation.messages == (ASK, CALL, RESULT, ANSWER, AGAIN)


def test_without_thinking_an_empty_block_stays_over_tool_results_and_goes_at_a_user_message():
    conversation = TemplateConversation(CHAT, (ASK,), thinking=False)
    said = sampled(CALL, thinking=False)
    seen = conversation.prompt_ids() + said
    conversation.add_sampled(said)
    conversation.add([RESULT])
    assert conversation.prompt_ids()[: len(seen)] == seen and "</think>" in CHAT.decode(seen)
    conversation.add_sampled(sampled(ANSWER, thinking=False))
    conversation.add([AGAIN])
    assert CHAT.decode(conversation.prompt_ids()).count("<think>") == 1  # of the turn to come


def test_a_template_that_leaves_history_alone_extends_at_a_user_message_as_well():
    plain = chat_of(TEMPLATE.replace("SHOWN", "false").replace("{%- if not enable_thinking", "{%- if false"))
    conversation = TemplateConversation(plain, (ASK,), thinking=False)
    said = (*plain.encode("1"), *plain.encode("5"), plain.eos_id)
    seen = conversation.prompt_ids() + said
    conversation.add_sampled(said)
    conversation.add([AGAIN])
    assert conversation.prompt_ids()[: len(seen)] == seen


def test_a_prompt_that_opens_the_reasoning_is_understood():
    conversation = TemplateConversation(OPENED_CHAT, (ASK,), thinking=True)
    assert OPENED_CHAT.decode(conversation.prompt_ids()) == OPENING + "<think>\n"
    assert conversation.add_sampled(OPENED_CHAT.encode("look\n</think>\n\n" + CALL_TEXT)) == CALL


NEVER = TEMPLATE.replace("SHOWN", "false")
OTHER_CALLS = QWEN.replace("tool_call>", "call>")
NO_RESULTS = QWEN.replace("m.content + '\\n</tool", "raise_exception('no tools') + '\\n</tool")
NO_PROMPT = QWEN.replace("'<|im_start|>assistant\\n' }}\n{%- if not", "'' }}\n{%- if not")


@pytest.mark.parametrize(
    ("template", "thinking", "tools", "reason"),
    [
        (NEVER, True, False, "set thinking=False"),
        (OTHER_CALLS, False, True, "give the syntax of its calls"),
        (NO_RESULTS, False, True, "refuses .*: no tools; use no tools"),
        (NO_PROMPT, False, False, "mend add_generation_prompt"),
        (NO_PROMPT, True, False, "mend add_generation_prompt"),
        (ALWAYS, False, False, "set thinking=True"),
    ],
    ids=["never shows", "other calls", "no results", "no prompt", "no prompt, thinking", "always thinks"],
)
def test_what_a_domain_uses_is_tried_before_it_is_played(template, thinking, tools, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        chat_of(template).verify(thinking=thinking, tools=tools)
    assert "probe" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "thinking"),
    [(NEVER, False), (OTHER_CALLS, True), (NO_RESULTS, True)],
    ids=["never shows", "other calls", "no results"],
)
def test_what_a_domain_does_not_use_is_not_asked_of_a_template(template, thinking):
    chat = chat_of(template)
    conversation = TemplateConversation(chat, (ASK,), thinking=thinking)
    assert conversation.add_sampled(sampled(ANSWER, thinking, chat)).content == "15"


def test_a_template_that_drops_reasoning_at_results_starts_a_new_segment():
    chat = chat_of(TEMPLATE.replace("SHOWN", "loop.last"))
    conversation = TemplateConversation(chat, (ASK,), thinking=True)
    conversation.add_sampled(sampled(CALL, chat=chat))
    conversation.add([RESULT])
    assert chat.decode(conversation.prompt_ids()) == OPENING + CALL_TEXT + RESULT_TEXT


def test_a_template_that_rewrites_history_later_starts_a_new_segment_when_it_does():
    late = QWEN.replace("+ m.content + '\\n</tool", "+ (m.content if messages | length < 5 else '') + '\\n</tool")
    chat = chat_of(late)
    conversation = TemplateConversation(chat, (ASK,), thinking=True)
    conversation.add_sampled(sampled(CALL, chat=chat))
    conversation.add([RESULT])
    seen = conversation.prompt_ids() + sampled(CALL, chat=chat)
    conversation.add_sampled(sampled(CALL, chat=chat))
    conversation.add([RESULT])
    prompt = conversation.prompt_ids()
    assert prompt[: len(seen)] != seen
    assert prompt == chat.encode(chat.render(conversation.messages, thinking=True, turn=True))


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        ("<think>a</think>b", True),
        ("b<|im_end|>", True),
        ("<think>b<|im_end|>", True),
        ("a<think>b</think>c<|im_end|>", True),
        ("<think>a</think>b</think>c<|im_end|>", True),
        ("<think>a</think>b<|im_end|>", False),
        ("b<|im_end|>c<|im_end|>", False),
        ("b<|im_start|>user\nc<|im_end|>", False),
        ("<tool_response>5</tool_response><|im_end|>", False),
        ("b</tool_call><|im_end|>", False),
        ('<tool_call>{"name": "f", "arguments": {}}<|im_end|>', False),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>b<|im_end|>', False),
        ('<tool_call>{"name": "f"}</tool_call><|im_end|>', False),
        ('<tool_call>{"name": "f", "arguments": {}, "id": 1}</tool_call><|im_end|>', False),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call><|im_end|>', False),
        ('<tool_call>{"name": "f", "arguments": {"x": 1, "x": 2}}</tool_call><|im_end|>', False),
        ('<tool_call>{"name": "f", "arguments": {"x": "<think>"}}</tool_call><|im_end|>', False),
        ("<tool_call>" + '{"a":' * 5000 + "</tool_call><|im_end|>", False),
    ],
)
def test_a_malformed_answer_is_refused(text, thinking):
    conversation = TemplateConversation(CHAT, (ASK,), thinking=thinking)
    before = conversation.prompt_ids()
    with pytest.raises(ValueError):
        conversation.add_sampled(CHAT.encode(text))
    assert conversation.prompt_ids() == before and conversation.messages == (ASK,)


def test_bytes_that_are_no_text_are_malformed():
    first_byte, *_ = CHAT.encode("火")
    with pytest.raises(ValueError, match="broken characters"):
        CHAT.parse((first_byte, CHAT.eos_id), thinking=False)


MARKS = ["<|im_end|>", "<|endoftext|>", "</think>", "<tool_call>", "</tool_response>", "<<|im_end|>>"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("role", ["system", "user", "tool", "assistant"])
def test_marks_in_the_text_of_the_world_are_data(role, mark):
    asked = Message(role, f"look: {mark}")
    before = {"system": (), "user": (), "tool": (ASK, CALL), "assistant": (ASK,)}[role]
    after = () if role in ("user", "tool") else (AGAIN,)
    prompt = TemplateConversation(CHAT, (*before, asked, *after), thinking=True).prompt_ids()
    plain = TemplateConversation(CHAT, (*before, replace(asked, content="look: X"), *after), thinking=True).prompt_ids()
    assert CHAT.decode(prompt) == CHAT.decode(plain).replace("look: X", f"look: {mark}")
    added = CHAT.added.values()
    assert [i for i in prompt if i in added] == [i for i in plain if i in added]


def test_marks_in_a_result_end_nothing_and_the_prompt_extends_what_was_seen():
    conversation = TemplateConversation(CHAT, (ASK,), thinking=True)
    seen = conversation.prompt_ids() + sampled(CALL)
    conversation.add_sampled(sampled(CALL))
    conversation.add([Message("tool", "<|im_end|>\n<|im_start|>user\n</tool_call>")])
    prompt = conversation.prompt_ids()
    assert prompt[: len(seen)] == seen
    seen = prompt + sampled(CALL)
    conversation.add_sampled(sampled(CALL))
    conversation.add([RESULT])
    assert conversation.prompt_ids()[: len(seen)] == seen


def test_marks_in_the_description_of_a_tool_are_data():
    tool = {**TOOL, "description": "</think> and <|im_end|>"}
    prompt = TemplateConversation(
        chat_of(WITH_TOOLS), (replace(SYSTEM, tools=(tool,)), ASK), thinking=True
    ).prompt_ids()
    assert "</think> and <|im_end|>" in CHAT.decode(prompt)
    assert CHAT.added["</think>"] not in prompt and prompt.count(CHAT.eos_id) == 2


@pytest.mark.parametrize("replies", [(AGAIN,), (RESULT, RESULT), ()])
def test_calls_need_their_results(replies):
    conversation = TemplateConversation(CHAT, (ASK,), thinking=True)
    conversation.add_sampled(sampled(CALL))
    with pytest.raises(ValueError, match=r"tool calls|nothing to answer"):
        conversation.add(replies)
        conversation.prompt_ids()


WITH_TOOLS = QWEN.replace(
    "m.content + '<|im_end|>\\n' }}\n{%- endif", "m.content + SPEC + '<|im_end|>\\n' }}\n{%- endif"
).replace("SPEC", "((tools | tojson) if tools and loop.first else '')")
TOOL = {"name": "get", "description": "Get a value.", "parameters": {"type": "object"}}


def test_tools_reach_the_policy_through_the_template():
    conversation = TemplateConversation(chat_of(WITH_TOOLS), (replace(SYSTEM, tools=(TOOL,)), ASK), thinking=True)
    text = CHAT.decode(conversation.prompt_ids())
    assert text.startswith('<|im_start|>system\nS[{"type": "function", "function": {"name": "get", ')


def test_a_template_that_leaves_out_tools_is_refused():
    conversation = TemplateConversation(CHAT, (replace(SYSTEM, tools=(TOOL,)), ASK), thinking=True)
    with pytest.raises(ValueError, match=r"leaves out the tools \['get'\]"):
        conversation.prompt_ids()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((Message("developer", "D"),), "no developer"),
        ((replace(SYSTEM, response_format={"type": "object"}),), "no response format"),
        ((Message("function", "F"),), "no role 'function'"),
        ((ASK, ANSWER, ANSWER), "with one message"),
        ((ASK, SYSTEM), "between a question and its answer"),
    ],
)
def test_what_could_not_be_played_is_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        TemplateConversation(CHAT, messages, thinking=True)


@pytest.mark.parametrize("messages", [(), (SYSTEM,), (ASK, CALL), (ASK, ANSWER)])
def test_the_policy_answers_only_a_user_or_results(messages):
    conversation = TemplateConversation(CHAT, messages, thinking=True)
    with pytest.raises(ValueError):
        conversation.add_sampled(sampled(ANSWER))


@pytest.mark.parametrize("message", [replace(ANSWER, content="15\n"), replace(ANSWER, content="\ufffd")])
def test_what_could_not_be_read_back_is_not_written(message):
    with pytest.raises(ValueError):
        CHAT.encode_assistant(message, thinking=True)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ValueError, match="needs a chat_template"):
        TemplateChat(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))))


TEXT = st.text(st.sampled_from("apl 12谢\n\"'<>{}&"), max_size=8).map(lambda text: text.strip("\n"))
VALUES = st.recursive(TEXT | st.integers() | st.booleans() | st.none(), lambda one: st.lists(one, max_size=2))
CALLS = st.lists(st.builds(ToolCall, st.just("get"), st.dictionaries(TEXT, VALUES, max_size=2)), max_size=2).map(tuple)
SAID = st.builds(Message, st.just("assistant"), TEXT, TEXT, CALLS)


@given(SAID, st.booleans(), st.sampled_from([CHAT, OPENED_CHAT]))
def test_what_is_rendered_is_read_back(message, thinking, chat):
    message = message if thinking else replace(message, reasoning="")
    assert chat.parse(sampled(message, thinking, chat), thinking=thinking) == message


@settings(max_examples=20)
@given(st.lists(SAID, min_size=1, max_size=3), st.booleans(), st.builds(Random, st.integers(0, 2**32)))
def test_what_trains_is_what_was_sampled(said, thinking, rng):
    said = [message if thinking else replace(message, reasoning="") for message in said]
    engine = Engine(CHAT, list(said), thinking, rng)
    rules = Rules(
        sampling=Sampling(max_tokens=10**5), max_len=10**6, weigh=lambda parts: parts["outcome"], thinking=thinking
    )
    played = asyncio.run(
        play_group(
            lambda: Scene(len(said), (SYSTEM, ASK)),
            name="g",
            domain="d",
            group_size=2,
            generate=engine,
            chat=CHAT,
            rules=rules,
            seed=0,
        )
    )
    assert played.group is not None and played.lost == ()
    drops = sum(not message.tool_calls for message in said[:-1])
    assert [engine.check(episode) for episode in played.group.episodes] == [1 + drops] * 2
