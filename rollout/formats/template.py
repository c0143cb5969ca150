"""The rules of chat.py for a model that brings its own chat template, through its tokenizer.

The template says how a conversation reads. Within a segment, what the policy sampled is carried as ids and never
tokenised again; a new segment's prompt is the template's text. What a template can do is found by trying it, before the
first minute, and only what a domain uses is asked of it (TemplateChat.verify).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimtab.environments.base import Message
from trimtab.rollout.checkpoint import read_config, stop_ids
from trimtab.rollout.formats.chat import SPECIAL_TOKENS, Chat, MarkupError, check_turns, check_unicode
from trimtab.rollout.formats.letters import cleaned
from trimtab.rollout.formats.openai_messages import dump_arguments
from trimtab.rollout.formats.probing import AGAIN, ASK, CALL, REASONING, RESULT, SAID, TOOL, anonymous, probe
from trimtab.rollout.formats.rendering import Rendering
from trimtab.rollout.formats.strict_json import dumps
from trimtab.rollout.formats.syntax import Schemas, Syntax, find_syntax, parameter_schemas


class TemplateChat(Rendering):
    """The format that a tokenizer's template defines.

    Args:
        syntax: how the policy writes reasoning and calls; None: as the first preset that reads back what the template
            writes.
        stops: ids that end a turn besides those of the template, as stop_ids of the checkpoint has them.
        vocabulary: rows of the model's embedding, which must know what ends a turn; None: not checked.

    Raises:
        ValueError: the tokenizer has no template, or its template does not write turns that a token ends.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        syntax: Syntax | None = None,
        stops: Iterable[int] = (),
        vocabulary: int | None = None,
    ):
        super().__init__(tokenizer)
        found = probe(self, syntax)
        self.syntax, self._faults = found.syntax, found.faults
        self.eos, self.call_eos, self.eos_id = found.end, found.call_end, self.added[found.end]
        marks = [mark for mark in self.syntax.marks if syntax or mark in self.added or mark in self.source]
        self.reserve((*marks, self.eos, self.call_eos))
        self.ends = {self.added[text]: text for text in (self.eos, self.call_eos)}
        self.stop_ids = tuple(dict.fromkeys((*self.ends, *stops)))
        """What an engine must stop at."""
        if vocabulary is not None and (lacking := [i for i in self.ends if i >= vocabulary]):
            raise ValueError(
                f"the template ends a turn with {self.ends[lacking[0]]!r}, id {lacking[0]}, for which the model has no "
                f"embedding (it has {vocabulary}), so no turn would ever stop; take the tokenizer of the model"
            )
        opening, closing = re.escape(self.syntax.think_open), re.escape(self.syntax.think_close)
        self._empty = re.compile(opening + r"\s*" + closing + r"\n*")
        self._opening = re.compile(opening + r"\s*(?:" + closing + r"\s*)?\Z")
        self._verified: set[tuple[bool, bool]] = set()
        self._before, self._behind = self._find_spaces()

    @classmethod
    def load(cls, path: str | Path, syntax: Syntax | None = None) -> "TemplateChat":
        """The format over the tokenizer of a checkpoint folder."""
        return cls(AutoTokenizer.from_pretrained(path), syntax, stop_ids(path), _vocabulary(path))

    def _find_spaces(self) -> tuple[str, str]:
        """The space that some templates write before an answer, and behind it."""
        try:
            said = self._turn(SAID, thinking=False)[1]
        except ValueError:  # cannot be played without thinking, which verify says
            return "", ""
        before, _, behind = said.partition(SAID.content)
        return (before, behind) if not (before + behind).strip(" ") else ("", "")

    def verify(self, *, thinking: bool, tools: bool = False) -> None:
        """Try what a domain asks of the template, once for each combination.

        Args:
            thinking: whether the policy reasons.
            tools: whether the domain offers tools.

        Raises:
            ValueError: one sentence that says what the template lacks and what to do.
        """
        if (thinking, tools) in self._verified:
            return
        asked = [what for what, is_asked in (("thinking", thinking), ("tools", tools)) if is_asked]
        if faults := [self._faults[what] for what in asked if what in self._faults]:
            raise ValueError(faults[0])
        reasoning = REASONING if thinking else ""
        self._try(replace(SAID, reasoning=reasoning), thinking=thinking)
        self.render((ASK, SAID, AGAIN), thinking=thinking, turn=True)
        if tools:
            said = replace(CALL, reasoning=reasoning)
            text = self.render((Message("system", "S", tools=(TOOL,)), ASK, said, RESULT), thinking=thinking, turn=True)
            if RESULT.content not in text:
                raise ValueError("the template leaves out the results of tools; use no tools, or another template")
            self._try(said, thinking=thinking)
        self._verified.add((thinking, tools))

    def _try(self, message: Message, *, thinking: bool) -> None:
        prompt, said, _ = self._turn(message, thinking=thinking)
        opened = self.is_opened(prompt, thinking=thinking)
        first = message.reasoning or message.content
        before = said.partition(first)[0].replace(self.syntax.think_open, "") if first and not opened else ""
        if before.strip():
            raise ValueError(
                f"the template writes {before.strip()!r} before an answer, which its prompt for a turn leaves to the "
                "policy; set thinking=True if this marks an answer behind reasoning, or mend add_generation_prompt"
            )
        try:
            self.encode_assistant(message, thinking=thinking)
        except ValueError as error:  # about the probe, which users did not write
            what = "a call" if message.tool_calls else "an answer with reasoning" if thinking else "an answer"
            raise ValueError(
                f"the template writes {what} as {anonymous(said)!r:.200}, which the syntax with the marks "
                f"{self.syntax.marks} does not read; give the syntax that it uses"
            ) from error

    def conversation(self, messages: Iterable[Message], *, thinking: bool) -> "TemplateConversation":
        """A conversation in this format that begins with messages."""
        return TemplateConversation(self, messages, thinking=thinking)

    def is_opened(self, prompt: str, *, thinking: bool) -> bool:
        """Whether the prompt has opened the reasoning, so that the policy goes on within it.

        Raises:
            ValueError: it has, in a conversation without thinking.
        """
        opened = prompt.rstrip().endswith(self.syntax.think_open)
        if opened and not thinking:
            raise ValueError(
                f"the template opens reasoning with {self.syntax.think_open!r} although enable_thinking is false; play "
                "it with thinking (set thinking=True)"
            )
        return opened

    def encode_assistant(self, message: Message, *, thinking: bool, schemas: Schemas | None = None) -> tuple[int, ...]:
        """The ids a policy would have sampled to say message in a first turn, the end of the turn included.

        Args:
            schemas: as parse takes them; forms without quotes cannot tell the text 1 from the number without.

        Raises:
            MarkupError: text that contains a mark.
            ValueError: reasoning without thinking, what parse would not read back as the same, a template that does
                not begin a turn as it asks for one.
        """
        self.check(message, thinking=thinking)
        self._check_marks(message)
        prompt, said, end = self._turn(message, thinking=thinking)
        ids = (*self.encode(said), self.added[end])
        opened = self.is_opened(prompt, thinking=thinking)
        if (read := self.parse(ids, thinking=thinking, opened=opened, schemas=schemas)) != message:
            raise ValueError(f"the format cannot say {message}: it reads back as {read}")
        return ids

    def _turn(self, message: Message, *, thinking: bool) -> tuple[str, str, str]:
        """The prompt of a first turn, what a policy says there to say message, and the token that ends it."""
        prompt = self.render((ASK,), thinking=thinking, turn=True, calls=bool(message.tool_calls))
        text = self.render((ASK, message), thinking=thinking, turn=False)
        begun = next((one for one in (prompt, self._opening.sub("", prompt)) if text.startswith(one)), None)
        if begun is None:
            asked = prompt.rpartition(ASK.content)[2]
            raise ValueError(f"the template asks for a turn with {asked!r} but does not begin turns so; mend it")
        said = text[len(begun) :]
        end = self.call_eos if message.tool_calls else self.eos
        said = said.partition(end)[0]
        if thinking and self.syntax.think_close not in said:  # shown in no history, as by DeepSeek-R1
            opening = "" if self.is_opened(prompt, thinking=thinking) else self.syntax.think_open
            said = f"{opening}{message.reasoning}\n{self.syntax.think_close}\n\n{said}"
        return prompt, said, end

    def check(self, message: Message, *, thinking: bool) -> None:
        """Refuse what templates have no place for.

        Raises:
            MarkupError: text that is not Unicode.
            ValueError: reasoning without thinking, arguments that are not JSON, a developer, a response format.
        """
        if message.role == "developer" or message.response_format is not None:
            raise ValueError("templates know no developer and no response format; say it in a system message's text")
        if message.reasoning and not thinking:
            raise ValueError(f"a conversation without thinking has no reasoning, got {message.reasoning[:80]!r}")
        for text in _texts(message):
            check_unicode(text)

    def _check_marks(self, message: Message) -> None:
        for text in _texts(message):
            if found := next((mark for mark in self.reserved if mark in text), None):
                raise MarkupError(f"text contains the reserved {found!r}; remove it: {text[:80]!r}")

    def parse(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        thinking: bool,
        opened: bool | None = None,
        schemas: Schemas | None = None,
    ) -> Message:
        """Read what the policy sampled, strictly; newlines around reasoning and content belong to the template.

        Args:
            opened: whether the prompt opened the reasoning; None: as the template does in a first turn.
            schemas: those of the tools on offer (syntax.parameter_schemas); None: whatever is called is on offer.

        Raises:
            ValueError: no end of turn or one too many, reasoning not opened or not closed, bytes that are not UTF-8,
                misplaced marks, broken calls, ids that the tokenizer lacks.
        """
        ids = [int(i) for i in ids]
        if not ids or ids[-1] not in self.ends:
            raise ValueError(f"no {self.eos} after {self.decode(ids)[-80:]!r}")
        if unknown := self.unknown(ids):
            raise ValueError(f"ids that the tokenizer lacks: {unknown}")
        if opened is None:
            opened = self.is_opened(self.render((ASK,), thinking=thinking, turn=True), thinking=thinking)
        text = self.decode(ids[:-1])
        if "\ufffd" in text:
            raise ValueError(f"broken characters in {text[:80]!r}")
        message = self.read(text, thinking=thinking, opened=opened, schemas=schemas)
        self.check(message, thinking=thinking)
        self._check_marks(message)
        return message

    def read(self, text: str, *, thinking: bool, opened: bool, schemas: Schemas | None) -> Message:
        """The message that the text of a turn says; marks in it are not looked for.

        Raises:
            ValueError: reasoning not opened or not closed, broken calls.
        """
        reasoning = ""
        if thinking:
            text, closing = text if opened else text.lstrip(), self.syntax.think_close
            opening = "" if opened else self.syntax.think_open
            if not text.startswith(opening) or closing not in text:
                form = f"begin with {opening!r} and end" if opening else "end"
                raise ValueError(f"reasoning must {form} with {closing!r}: {text[:80]!r}")
            reasoning, _, text = text.removeprefix(opening).partition(closing)
        unmarked = schemas is not None and not schemas and not self.syntax.call_open
        content, calls = (text, ()) if unmarked else self.syntax.split(text, schemas or {})
        content = content.strip("\n").removeprefix(self._before).removesuffix(self._behind)
        return Message("assistant", content, reasoning.strip("\n"), calls)

    def after_turn(self, before: str, text: str, said: Message, end: str, schemas: Schemas) -> str | None:
        """What text says behind a turn that said said and ended with end, asked for by before.

        None where the template now shows the history, or this turn, otherwise than it did or as it was said. Blocks of
        reasoning with nothing in them do not count, nor spaces around the content.
        """
        head = self._empty.sub("", before)
        opened = head.rstrip().endswith(self.syntax.think_open) and bool(said.reasoning)
        if not said.reasoning:
            head = self._opening.sub("", head)
        for match in re.finditer("|".join(map(re.escape, self.ends.values())), text):
            shown = self._empty.sub("", text[: match.start()])
            if len(shown) >= len(head) and shown.startswith(head):
                break
        else:
            return None
        try:
            read = self.read(shown[len(head) :], thinking=bool(said.reasoning), opened=opened, schemas=schemas)
        except ValueError:  # shown otherwise than the policy can say it
            return None
        same = match[0] == end and replace(read, content=read.content.strip()) == replace(
            said, content=said.content.strip()
        )
        return text[match.end() :] if same else None


def _texts(message: Message) -> list[str]:
    calls = [text for call in message.tool_calls for text in (call.name, dump_arguments(call.arguments))]
    return [message.content, message.reasoning, *calls, *map(dumps, map(dict, message.tools))]


class TemplateConversation:
    """One conversation as the engine sees it, with the interface of chat.Conversation.

    After tool results the prompt is what the engine saw and sampled and the template's text of what came since, as long
    as the template shows what was said as it was said; blocks of reasoning with nothing in them stay as sampled. After
    a user message the prompt goes on from what was seen if the template still reads the same to the letter. Else all of
    it is tokenised, which starts a new segment.

    Raises:
        ValueError: the template cannot be played so (TemplateChat.verify), or messages that add refuses.
    """

    def __init__(self, chat: TemplateChat, messages: Iterable[Message], *, thinking: bool):
        messages = tuple(messages)
        chat.verify(thinking=thinking, tools=any(message.tools for message in messages))
        self._chat, self._thinking = chat, thinking
        self._seen_ids: tuple[int, ...] = ()  # up to the end of the last turn that the policy sampled
        self._seen_text = self._asked = ""  # their text; the template's when it asked for that turn
        self._seen = 0  # messages in them
        self.messages: tuple[Message, ...] = ()
        self.add(messages)

    @property
    def _schemas(self) -> Schemas:
        return parameter_schemas(tool for message in self.messages for tool in message.tools)

    def prompt_ids(self) -> tuple[int, ...]:
        """The whole conversation, ready for the policy to go on.

        Raises:
            ValueError: a call without a result, or a template that refuses the messages.
        """
        _, ids, after = self._prompt()
        return (*ids, *self._behind(ids, after))

    def _behind(self, ids: tuple[int, ...], text: str) -> tuple[int, ...]:
        """Ids of text as the tokenizer writes it behind ids: some begin every text of its own with a space."""
        if not ids:
            return self._chat.encode(text)
        return self._chat.encode(self._chat.ends[ids[-1]] + text)[1:]

    def _prompt(self) -> tuple[str, tuple[int, ...], str]:
        """The template's text, what of the prompt is known as ids, and the text behind it."""
        if not self.messages or self.messages[-1].role not in ("user", "tool"):
            raise ValueError("nothing to answer: add a message of a user or a tool")
        text = self._chat.render(self.messages, thinking=self._thinking, turn=True)
        after = self._after(text) if self._seen_ids else None
        return (text, (), text) if after is None else (text, self._seen_ids, after)

    def _after(self, text: str) -> str | None:
        if text.startswith(self._seen_text):
            return text[len(self._seen_text) :]
        if any(message.role == "user" for message in self.messages[self._seen :]):
            return None
        end = self._chat.ends[self._seen_ids[-1]]
        return self._chat.after_turn(self._asked, text, self.messages[self._seen - 1], end, self._schemas)

    def add(self, messages: Iterable[Message]) -> None:
        """Append messages that this policy did not sample; on an error nothing is appended.

        Raises:
            ValueError: messages that cannot follow (chat.check_turns), or that TemplateChat.check refuses.
        """
        messages = cleaned(messages)
        check_turns((*self.messages, *messages))
        for message in messages:
            self._chat.check(message, thinking=self._thinking)
        self.messages += messages

    def add_sampled(self, ids: Sequence[int] | np.ndarray) -> Message:
        """Append what the policy sampled after prompt_ids(), as sampled, and return what it says.

        Raises:
            ValueError: it is malformed, or calls that the template refuses (two at once, for some); nothing is
                appended.
        """
        chat, ids = self._chat, tuple(int(i) for i in ids)
        asked, seen, after = self._prompt()
        opened = chat.is_opened(asked, thinking=self._thinking)
        message = chat.parse(ids, thinking=self._thinking, opened=opened, schemas=self._schemas)
        if message.tool_calls:
            chat.render((*self.messages, message), thinking=self._thinking, turn=False)
        self._seen_text = (self._seen_text if seen else "") + after + chat.decode(ids)
        self._seen_ids, self._asked = (*seen, *self._behind(seen, after), *ids), asked
        self.messages += (message,)
        self._seen = len(self.messages)
        return message


def load_format(path: str | Path, syntax: Syntax | str | None = None) -> Chat | TemplateChat:
    """The format of a checkpoint folder: DeepSeek-V3.2's where its tokenizer has the tokens, else its own template.

    Args:
        syntax: how the policy writes reasoning and calls; a name is that of a preset, empty or None: as the template.

    Raises:
        ValueError: it has neither format, or no tokenizer; a template that cannot be played; a syntax for V3.2.
    """
    if isinstance(syntax, str):
        syntax = find_syntax(syntax) if syntax else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no tokenizer: save it beside the weights ({error})") from error
    if set(SPECIAL_TOKENS) <= tokenizer.get_vocab().keys():
        if syntax is not None:
            raise ValueError(f"{path} has the format of DeepSeek-V3.2, which has its own calls; leave out the syntax")
        return Chat(tokenizer, stop_ids(path))
    try:
        return TemplateChat(tokenizer, syntax, stop_ids(path), _vocabulary(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def vocabulary(path: str | Path) -> dict[str, int]:
    """The tokens of a checkpoint folder's tokenizer with their ids.

    Raises:
        ValueError: it has no tokenizer.
    """
    try:
        return dict(AutoTokenizer.from_pretrained(path).get_vocab())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no tokenizer: save it beside the weights ({error})") from error


def _vocabulary(path: str | Path) -> int | None:
    if not (Path(path) / "config.json").is_file():
        return None
    size = read_config(path).get("vocab_size")
    return None if size is None else int(size)
