"""The forms in which real chat templates write conversations: which modes each has, and what plays in them."""

import asyncio
import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import Engine, Scene
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.attempt import Rules
from trimtab.rollout.formats.chat import FormatError, MarkupError
from trimtab.rollout.formats.syntax import PRESETS, Syntax, parameter_schemas
from trimtab.rollout.formats.template import TemplateChat, load_format
from trimtab.rollout.play import play_group
from trimtab.rollout.types import Sampling

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("benchmark_templates", ROOT / "benchmarks" / "templates.py")
TABLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TABLE)
TEMPLATES = {path.stem: path.read_text() for path in (ROOT / "tests" / "templates").glob("*.jinja")}
MODES = {
    "chatml": "plain",
    "deepseek_r1": "thinking",
    "gemma": "plain",
    "glm4": "plain tools thinking both",
    "gptoss": "thinking",
    "lfm2": "plain tools",
    "llama3": "plain",
    "llama3_calls": "plain tools",
    "mistral": "plain tools",
    "mistral_args": "plain tools thinking both",
    "phi3": "plain",
    "qwen2": "plain tools",
    "qwen3_5": "plain tools thinking both",
    "smollm2": "plain",
    "smolvlm": "plain",
}
PLAYED = [(name, mode) for name, modes in MODES.items() for mode in modes.split()]
TOOLS = [(name, mode) for name, mode in PLAYED if mode in ("tools", "both")]
ENDS = {  # of an answer, and of calls where those end otherwise
    "deepseek_r1": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "gemma": "<end_of_turn>",
    "glm4": "<|user|> <|observation|>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "llama3_calls": "<|eot_id|>",
    "mistral": "</s>",
    "mistral_args": "</s>",
    "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}
TOOL = {
    "name": "get",
    "description": "Get.",
    "parameters": {"type": "object", "properties": {"k": {"type": "string"}, "n": {"type": "integer"}}},
}
SYSTEM, ASK, AGAIN = Message("system", "S", tools=(TOOL,)), Message("user", "Q"), Message("user", "And?")
CALL = Message("assistant", tool_calls=(ToolCall("get", {"k": "1", "n": 2}),))


@cache
def chat_of(name: str) -> TemplateChat:
    return TemplateChat(TABLE.stand_in(TEMPLATES[name]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_plays_in_the_modes_that_it_has(name):
    found = TABLE.results(TEMPLATES[name])
    assert [mode for mode, fault in found.items() if not fault] == MODES[name].split()
    for fault in filter(None, found.values()):
        assert "probe" not in fault and "\n" not in fault
        assert any(remedy in fault for remedy in ("use no tools", "set thinking=False", "set thinking=True"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_turns_comes_from_the_template(name):
    chat = chat_of(name)
    assert list(chat.ends.values()) == ENDS.get(name, "<|im_end|>").split()
    assert set(chat.stop_ids) == set(chat.ends)
    assert TemplateChat(TABLE.stand_in(TEMPLATES[name]), stops=(7,)).stop_ids == (*chat.ends, 7)


@pytest.mark.parametrize("name", ["gemma", "glm4", "llama3", "smollm2"])
def test_an_end_that_is_no_token_or_has_no_embedding_is_refused(name):
    tokenizer = TABLE.stand_in(TEMPLATES["phi3"])
    tokenizer.chat_template = TEMPLATES[name]
    with pytest.raises(ValueError, match="no turn would ever stop"):
        TemplateChat(tokenizer)
    known = TABLE.stand_in(TEMPLATES[name])
    with pytest.raises(ValueError, match="no embedding"):
        TemplateChat(known, vocabulary=256)
    assert TemplateChat(known, vocabulary=len(known)).eos


@pytest.mark.parametrize("answer", ["15", "two\nlines", 'a: {"b": 1}'])
def test_a_plain_question_plays_over_the_template_of_smollm2(answer):
    chat = chat_of("smollm2")
    conversation = chat.conversation((ASK,), thinking=False)
    opening = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert chat.decode(conversation.prompt_ids()) == f"{opening}<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    seen = (*conversation.prompt_ids(), *chat.encode(answer), chat.eos_id)
    assert conversation.add_sampled(seen[len(conversation.prompt_ids()) :]) == Message("assistant", answer)
    conversation.add([AGAIN])
    prompt = conversation.prompt_ids()
    assert prompt[: len(seen)] == seen
    assert chat.decode(prompt[len(seen) :]) == "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("name", "mode"), TOOLS)
def test_results_extend_what_the_engine_saw(name, mode):
    thinking, chat = mode == "both", chat_of(name)
    said = replace(CALL, reasoning="look" if thinking else "")
    ids = chat.encode_assistant(said, thinking=thinking, schemas=parameter_schemas([TOOL]))
    conversation = chat.conversation((SYSTEM, ASK), thinking=thinking)
    seen = (*conversation.prompt_ids(), *ids)
    assert conversation.add_sampled(ids) == said
    conversation.add([Message("tool", "5")])
    prompt = conversation.prompt_ids()
    assert prompt[: len(seen)] == seen and "5" in chat.decode(prompt[len(seen) :])
    assert chat.decode(prompt) == chat.render(conversation.messages, thinking=thinking, turn=True)


def test_a_call_spelt_in_another_way_is_carried_as_sampled():
    chat = chat_of("qwen2")
    ids = (*chat.encode('<tool_call>{"arguments":{"n":2,"k":"1"},"name":"get"}</tool_call>'), chat.eos_id)
    conversation = chat.conversation((SYSTEM, ASK), thinking=False)
    seen = (*conversation.prompt_ids(), *ids)
    assert conversation.add_sampled(ids) == CALL
    conversation.add([Message("tool", "5")])
    assert conversation.prompt_ids()[: len(seen)] == seen


@pytest.mark.parametrize("name", ["qwen3_5", "glm4"])
def test_values_without_quotes_are_read_by_the_schema_of_the_tool(name):
    chat = chat_of(name)
    with pytest.raises(ValueError, match="cannot say"):
        chat.encode_assistant(CALL, thinking=False)
    ids = chat.encode_assistant(CALL, thinking=False, schemas=parameter_schemas([TOOL]))
    assert chat.conversation((SYSTEM, ASK), thinking=False).add_sampled(ids) == CALL


def test_json_that_looks_like_a_call_is_an_answer_where_no_tool_is_offered():
    chat = chat_of("llama3_calls")
    text = '{"name": "Anna", "parameters": {}}'
    said = (*chat.encode(text), chat.eos_id)
    assert chat.conversation((ASK,), thinking=False).add_sampled(said) == Message("assistant", text)
    assert chat.conversation((SYSTEM, ASK), thinking=False).add_sampled(said).tool_calls == (ToolCall("Anna"),)


def test_two_calls_at_once_are_malformed_where_the_template_allows_one():
    refusal = "{%- if (m.tool_calls or []) | length > 1 -%}{{- raise_exception('one at once') -}}{%- endif -%}"
    once = TEMPLATES["qwen2"].replace("{%- for call", refusal + "{%- for call")
    chat = TemplateChat(TABLE.stand_in(once))
    conversation = chat.conversation((SYSTEM, ASK), thinking=False)
    call = '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
    with pytest.raises(ValueError, match="one at once"):
        conversation.add_sampled((*chat.encode(call + call), chat.eos_id))
    assert conversation.messages == (SYSTEM, ASK)


@pytest.mark.parametrize("name", ["llama3", "mistral", "smollm2", "chatml"])
def test_a_begin_of_text_comes_from_the_template_alone(name):
    tokenizer = TABLE.stand_in(TEMPLATES[name])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    chat = TemplateChat(tokenizer)
    conversation = chat.conversation((ASK,), thinking=False)
    count = int("bos_token" in TEMPLATES[name])
    assert conversation.prompt_ids().count(tokenizer.bos_token_id) == count
    conversation.add_sampled(chat.encode_assistant(Message("assistant", "15"), thinking=False))
    conversation.add([AGAIN])
    assert conversation.prompt_ids().count(tokenizer.bos_token_id) == count
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert list(chat.conversation((ASK,), thinking=False).prompt_ids()) == expected


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_tokenizer_that_begins_texts_with_a_space_cuts_marks_or_says_that_it_cannot(scheme):
    letters = {letter: i for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyzQ<>[]/|_ISNT\n")}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATES["mistral"]
    conversation = TemplateChat(fast).conversation((Message("user", "is </s> a mark"),), thinking=False)
    if scheme == "always":
        with pytest.raises(MarkupError, match="writes what begins '</s> a mark"):
            conversation.prompt_ids()
    else:
        assert fast.eos_token_id not in conversation.prompt_ids()
        assert "is </s> a mark" in fast.decode(conversation.prompt_ids())


def test_a_syntax_that_is_given_writes_the_calls_which_a_template_leaves_out():
    offers = "{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + TEMPLATES["smollm2"]
    with pytest.raises(ValueError, match="use no tools"):
        TemplateChat(TABLE.stand_in(offers)).verify(thinking=False, tools=True)
    chat = TemplateChat(TABLE.stand_in(offers), PRESETS["hermes"])
    chat.verify(thinking=False, tools=True)
    said = '<tool_call>\n{"name": "get", "arguments": {"k": "1", "n": 2}}\n</tool_call><|im_end|>'
    assert chat.decode(chat.encode_assistant(CALL, thinking=False)) == said


def test_a_syntax_that_the_template_does_not_write_is_refused():
    chat = TemplateChat(TABLE.stand_in(TEMPLATES["qwen2"]), PRESETS["mistral"])
    chat.verify(thinking=False, tools=False)
    with pytest.raises(ValueError, match="the syntax does not read"):
        chat.verify(thinking=False, tools=True)


def test_marks_of_ones_own_are_given_with_a_syntax():
    own = TEMPLATES["mistral_args"].replace("[THINK]", "<why>").replace("[/THINK]", "</why>")
    with pytest.raises(ValueError, match="set thinking=False for this domain, or give the syntax"):
        TemplateChat(TABLE.stand_in(own)).verify(thinking=True, tools=False)
    syntax = replace(PRESETS["mistral-args"], think_open="<why>", think_close="</why>")
    chat = TemplateChat(TABLE.stand_in(own), syntax)
    said = Message("assistant", "15", "add")
    assert chat.parse(chat.encode_assistant(said, thinking=True), thinking=True) == said
    with pytest.raises(ValueError, match="two marks"):
        Syntax(think_open="")


def test_named_templates_use_the_one_for_tools_where_there_are_some():
    tokenizer = TABLE.stand_in(TEMPLATES["qwen2"])
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["qwen2"]}
    chat = TemplateChat(tokenizer)
    chat.verify(thinking=False, tools=True)
    plain = chat.conversation((ASK,), thinking=False).prompt_ids()
    assert chat.decode(plain) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["{{ 'x' }}", "{{ messages[0].content }}", "{{ raise_exception('no') }}"])
def test_what_is_no_template_of_chats_is_refused(template):
    tokenizer = TABLE.stand_in(TEMPLATES["smollm2"])
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"cannot be played|refuses"):
        TemplateChat(tokenizer)


def test_a_format_is_loaded_with_its_stops_and_syntax(tmp_path):
    tokenizer = TABLE.stand_in(TEMPLATES["qwen2"], eos="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {len(tokenizer)}, "eos_token_id": 3}}')
    chat = load_format(tmp_path)
    im_end, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert chat.stop_ids == (im_end, 3, end_of_text)
    assert load_format(tmp_path, "function").syntax.read == PRESETS["function"].read
    with pytest.raises(ValueError, match="no syntax 'herme'; there are hermes, "):
        load_format(tmp_path, "herme")
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    with pytest.raises(ValueError, match="no embedding"):
        load_format(tmp_path)


def test_ids_that_only_pad_the_vocabulary_are_malformed():
    chat = chat_of("smollm2")
    with pytest.raises(ValueError, match="lacks"):
        chat.parse((len(chat._tokenizer) + 5, chat.eos_id), thinking=False)


WORDS = st.text(st.sampled_from("apl 1é\"'{}&\n"), max_size=8)
TEXT = WORDS.map(str.strip)
VALUES = TEXT | st.integers(-9, 9) | st.booleans() | st.none() | st.lists(st.integers(), max_size=2)
NAMES = st.sampled_from(["k", "n", "other"])
CALLS = st.lists(st.builds(ToolCall, st.just("get"), st.dictionaries(NAMES, VALUES, max_size=2)), max_size=2).map(tuple)
SAID = st.builds(Message, st.just("assistant"), TEXT, TEXT, CALLS)


def sayable(chat: TemplateChat, message: Message, *, thinking: bool, tools: bool) -> Message:
    """message without what the mode, or the form, has no place for."""
    message = replace(message, reasoning=message.reasoning if thinking else "")
    calls = message.tool_calls if tools else ()
    if chat.syntax.call_open == "" or chat is chat_of("mistral"):
        calls = calls[:1] if chat.syntax.call_open == "" else calls
        message = replace(message, content="" if calls else message.content)
    return replace(message, tool_calls=calls)


@settings(max_examples=100, deadline=None)
@given(SAID, st.sampled_from(PLAYED))
def test_what_is_written_is_read_back_or_refused(message, played):
    name, mode = played
    chat, thinking = chat_of(name), mode in ("thinking", "both")
    message = sayable(chat, message, thinking=thinking, tools=mode in ("tools", "both"))
    try:
        ids = chat.encode_assistant(message, thinking=thinking)
    except ValueError:
        unquoted = message.tool_calls and name in (
            "qwen3_5",
            "glm4",
        )  # a text that is also a number, or has line breaks
        assert unquoted or message.content.startswith("{") or (name == "gptoss" and not message.reasoning)
        return
    assert chat.parse(ids, thinking=thinking) == message


@settings(max_examples=40, deadline=None)
@given(st.lists(SAID, min_size=1, max_size=3), st.sampled_from(PLAYED), st.builds(Random, st.integers(0, 2**32)))
def test_what_trains_is_what_the_engine_saw(said, played, rng):
    name, mode = played
    chat, thinking, tools = chat_of(name), mode in ("thinking", "both"), mode in ("tools", "both")
    said = [sayable(chat, message, thinking=thinking, tools=tools) for message in said]
    for message in said:
        try:
            chat.encode_assistant(message, thinking=thinking)
        except ValueError:  # the form cannot say it
            return
    engine = Engine(chat, list(said), thinking, rng)
    rules = Rules(
        sampling=Sampling(max_tokens=10**5), max_len=10**6, weigh=lambda parts: parts["outcome"], thinking=thinking
    )
    opening = (SYSTEM, ASK) if tools else (ASK,)
    played_group = asyncio.run(
        play_group(
            lambda: Scene(len(said), opening),
            name="g",
            domain="d",
            group_size=2,
            generate=engine,
            chat=chat,
            rules=rules,
            seed=0,
        )
    )
    assert played_group.group is not None and played_group.lost == ()
    for episode in played_group.group.episodes:
        assert 1 <= engine.check(episode) <= len(said)


def test_an_opening_that_the_template_refuses_costs_its_group_not_the_run():
    chat = chat_of("gemma")
    opening = (Message("user", "a"), Message("user", "b"))
    with pytest.raises(FormatError, match="must alternate"):
        chat.conversation(opening, thinking=False).prompt_ids()
    played = asyncio.run(
        play_group(
            lambda: Scene(1, opening),
            name="g",
            domain="d",
            group_size=2,
            generate=Engine(chat, [], False, Random(0)),
            chat=chat,
            rules=Rules(sampling=Sampling(), max_len=512, weigh=lambda parts: 0.0, thinking=False),
            seed=0,
        )
    )
    assert played.group is None and len(played.lost) == 2 and "must alternate" in played.lost[0].reason
