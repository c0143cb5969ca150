"""The tokenizer of a policy that starts from nothing: byte-level BPE with single digits."""

import re
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special: Sequence[str], markup: Sequence[str], bos: str, eos: str
) -> PreTrainedTokenizerFast:
    """Learn merges from texts. Digits stay single, so that numbers look alike everywhere.

    Args:
        special: control tokens, one id each, that text can never produce by merging.
        markup: structural strings of the chat format, one id each, so that a tool call costs few tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    structure = re.compile("|".join(map(re.escape, [*special, *markup])))
    tokenizer.train_from_iterator((part for text in texts for part in structure.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in markup])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False
    )
