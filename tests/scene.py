"""Episodes of random answers: an engine that says what it is given, in random spelling, and what must come of it."""

import random
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from trimtab.environments.base import Message, Step
from trimtab.rollout.formats.chat import Chat
from trimtab.rollout.formats.template import TemplateChat
from trimtab.rollout.types import Completion, Episode, Request

ASK, AGAIN = Message("user", "12 + 3?"), Message("user", "And?")


@dataclass
class Scene:
    """An environment that answers calls with results and everything else as the user, for some turns."""

    turns: int
    opening: tuple[Message, ...] = (ASK,)

    async def start(self) -> tuple[Message, ...]:
        return self.opening

    async def step(self, message: Message) -> Step:
        self.turns -= 1
        results = tuple(Message("tool", f"r{i}") for i in range(len(message.tool_calls)))
        return Step(replies=results or (AGAIN,), rewards={"outcome": 1.0}, done=self.turns == 0)


@cache
def letters(chat: Chat | TemplateChat, one: int) -> tuple[int, ...]:
    """A token letter by letter, where that is as good."""
    text = chat.decode([one])
    spelt = tuple(i for letter in text for i in chat.encode(letter))
    return spelt if text.isascii() and "<" not in text and chat.decode(spelt) == text else (one,)


@dataclass
class Engine:
    """Says given messages, the last one again and again, spelt in random pieces, or random ids for None.

    Every sampled token has a number of its own as its logp.
    """

    chat: Chat | TemplateChat
    said: list[Message | None]
    thinking: bool
    rng: random.Random
    seen: dict[str, list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """By episode: prompt, sampled ids and logp of every turn."""
    count: int = 0

    async def __call__(self, request: Request) -> list[Completion]:
        turn = int(request.name.rpartition(".")[2]) if "." in request.name else 0
        names = [request.name.partition(".")[0]] if turn else [f"g#{i}" for i in range(request.n)]
        return [self.say(request, name, self.spell(self.said[min(turn, len(self.said) - 1)])) for name in names]

    def spell(self, message: Message | None) -> list[int]:
        if message is None:
            return [*(self.rng.randrange(400) for _ in range(5)), self.chat.eos_id]
        ids = self.chat.encode_assistant(message, thinking=self.thinking)
        return [i for one in ids for i in (letters(self.chat, one) if self.rng.random() < 0.5 else (one,))]

    def say(self, request: Request, name: str, ids: list[int]) -> Completion:
        token_ids = np.array(ids, np.int32)
        logp = -np.arange(self.count, self.count + len(ids), dtype=np.float32)
        self.count += len(ids)
        self.seen.setdefault(name, []).append((request.prompt_ids, token_ids, logp))
        end = len(request.prompt_ids) + len(ids) - 1
        rows = np.arange(request.routes_start, end).astype(np.uint16)
        return Completion(
            token_ids=token_ids,
            logp=logp,
            kept_ids=token_ids,
            kept_offsets=np.arange(len(ids) + 1),
            routes=rows.reshape(-1, 1, 1),
            weight_version=self.count,
            finish="stop",
        )

    def check(self, episode: Episode) -> int:
        """Assert that an episode's segments are what the engine saw and sampled, turn by turn; return their number."""
        turns = iter(self.seen[episode.name])
        for segment in episode.segments:
            at, count = 0, 0
            while at < len(segment.token_ids):
                prompt, token_ids, logp = next(turns)
                end = len(prompt) + len(token_ids)
                assert segment.token_ids[:end].tolist() == [*prompt, *token_ids]
                assert not segment.sampled[at : len(prompt)].any() and segment.sampled[len(prompt) : end].all()
                assert (segment.logp[count : count + len(logp)] == logp).all()
                at, count = end, count + len(logp)
            assert (segment.routes[:, 0, 0] == np.arange(len(segment.token_ids) - 1)).all()
        assert next(turns, None) is None
        return len(episode.segments)
