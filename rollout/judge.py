"""Engines of our own as a judge."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trimtab.environments.base import Message
from trimtab.rewards.judging.model import Reply
from trimtab.rollout.attempt import Generate
from trimtab.rollout.formats.chat import Chat
from trimtab.rollout.formats.template import TemplateChat
from trimtab.rollout.types import Request, Sampling

RETRY_TOP_K = 20
"""A malformed reply is sampled anew from so many ids: the greedy one would come back the same."""


class EngineModel:
    """A frozen policy that judges. It answers greedily, and samples when it is asked again.

    Nothing holds it to a schema: a reply of another form counts as malformed. Usable as judging.model.Complete.

    Args:
        max_tokens: of a reply, reasoning included.
        thinking: it reasons before it answers.
    """

    def __init__(
        self, generate: Generate, chat: Chat | TemplateChat, *, identity: str, max_tokens: int, thinking: bool
    ) -> None:
        self.identity = f"{identity} max_tokens={max_tokens} thinking={thinking}"
        self._generate, self._chat, self._thinking = generate, chat, thinking
        self._greedy = Sampling(temperature=1.0, top_p=1.0, top_k=1, max_tokens=max_tokens)  # one id is kept

    async def __call__(self, prompt: str, schema: Mapping[str, Any] | None, attempt: int) -> Reply:
        """One reply.

        Raises:
            ValueError: the reply is cut off or malformed.
        """
        conversation = self._chat.conversation((Message("user", prompt),), thinking=self._thinking)
        prompt_ids = conversation.prompt_ids()
        sampling = replace(self._greedy, top_k=RETRY_TOP_K) if attempt else self._greedy
        name = f"judge-{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"
        (completion,) = await self._generate(Request(name=name, prompt_ids=prompt_ids, sampling=sampling, seed=attempt))
        text = conversation.add_sampled(completion.token_ids).content
        return Reply(text, len(prompt_ids), len(completion.token_ids))
