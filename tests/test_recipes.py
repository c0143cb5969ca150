"""Recipes that are made of others, and what demonstrations show."""

import random
from dataclasses import replace

import pytest

from trimtab.grpo.recipes import long_reasoning, quickstart, quickstart_long
from trimtab.grpo.stages.beginning import sources


def test_the_long_reasoning_variant_has_reasoning_alone_at_twice_the_length_and_a_quarter_of_its_price():
    normal, long = quickstart(), quickstart_long()
    assert [*long.domains] == ["reasoning"]
    before, after = normal.domains["reasoning"], long.domains["reasoning"]
    assert after.weights == before.weights | {"length": before.weights["length"] / 4}
    assert (after.length_soft, after.length_hard) == (2 * 96, 2 * 192)
    assert long.sampling.max_tokens == 2 * 128 and after.loss == before.loss
    unlimited = replace(before, length_soft=None, length_hard=None)
    found = long_reasoning(replace(normal, domains={"reasoning": unlimited}), ["reasoning"]).domains["reasoning"]
    assert found.length_soft is None and found.length_hard is None


@pytest.mark.parametrize("name", ["alignment", "poetry"])
def test_a_domain_that_does_not_reason_has_no_long_variant(name):
    with pytest.raises(ValueError, match=f"'{name}' is no domain that reasons; those that do are reasoning, agent"):
        long_reasoning(quickstart(), [name])


def test_a_domain_that_does_not_think_is_shown_answers_alone():
    reasoning = quickstart().domains["reasoning"]
    shown = {}
    for thinking in (True, False):
        demonstrate, told, _ = sources({"d": replace(reasoning, thinking=thinking)}, 0.0)["d"]
        assert told == thinking
        shown[thinking] = demonstrate(random.Random(1))
    assert shown[True][-1].reasoning and not any(message.reasoning for message in shown[False])
    assert [message.content for message in shown[True]] == [message.content for message in shown[False]]
