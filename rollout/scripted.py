"""A policy that follows a script instead of sampling: for examples, benchmarks and tests of what surrounds a policy."""

from collections.abc import Callable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.environments.base import Message
from trimtab.rollout.formats.chat import BOS, EOS, SPECIAL_TOKENS, Chat
from trimtab.rollout.types import Completion, Request

Say = Callable[[str, int], Message]
"""Takes the text of a prompt as an engine sees it, markup included, and a seed; returns what the assistant says."""


class Scripted:
    """Completes requests with what say says; logp is 0, every kept set holds one id, and there are no experts.

    The conversation thinks where the prompt ends with an open <think>. Completion i of a request gets the request's
    seed + i.
    """

    def __init__(self, chat: Chat, say: Say):
        self._chat, self._say = chat, say

    async def __call__(self, request: Request) -> list[Completion]:
        prompt = self._chat.decode(request.prompt_ids)
        thinking = request.prompt_ids[-1] == self._chat.think_open_id
        return [self._complete(request, self._say(prompt, request.seed + i), thinking) for i in range(request.n)]

    def _complete(self, request: Request, message: Message, thinking: bool) -> Completion:
        ids = self._chat.encode_assistant(message, thinking=thinking)
        token_ids = np.array(ids[: request.sampling.max_tokens], np.int32)
        routed = len(request.prompt_ids) + len(token_ids) - 1 - request.routes_start
        return Completion(
            token_ids=token_ids,
            logp=np.zeros(len(token_ids), np.float32),
            kept_ids=token_ids,
            kept_offsets=np.arange(len(token_ids) + 1),
            routes=np.zeros((routed, 0, 0), np.uint8),
            weight_version=0,
            finish="stop" if len(token_ids) == len(ids) else "length",
        )


def byte_chat() -> Chat:
    """The V3.2 format over a tokenizer of bytes, which needs no checkpoint."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Chat(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
        )
    )
