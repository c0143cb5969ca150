"""Seconds by phase, on a clock that the tests move."""

import asyncio

import pytest

from trimtab.grpo.cost.clock import Clock


class Hands:
    """A time that passes only when told."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def clock_and_hands(synchronise=None):
    hands = Hands()
    return Clock(synchronise and (lambda: synchronise(hands)), hands), hands


def test_a_phase_gets_the_seconds_within_it_and_no_others():
    clock, hands = clock_and_hands()
    hands.at = 5.0
    for _ in range(2):
        with clock.phase("weights"):
            hands.at += 2.0
        hands.at += 1.0
    assert clock.seconds() == {"weights": 4.0}


def test_an_inner_phase_takes_its_seconds_from_the_outer_one():
    clock, hands = clock_and_hands()
    with clock.phase("forward and backward"):
        hands.at += 1.0
        with clock.phase("reference"):
            hands.at += 4.0
        hands.at += 2.0
    assert clock.seconds() == {"forward and backward": 3.0, "reference": 4.0}


def test_seconds_are_those_since_they_were_last_asked_for():
    clock, hands = clock_and_hands()
    with clock.phase("rollout"):
        hands.at += 1.0
        assert clock.seconds() == {"rollout": 1.0}
        hands.at += 2.0
    assert clock.seconds() == {"rollout": 2.0}
    assert clock.seconds() == {}


def test_work_that_was_launched_counts_where_it_was_launched():
    """Three seconds of work are launched in the outer phase; the inner one begins when they are done."""
    pending = [3.0, 0.0, 0.5]  # waited for when reference begins, when it ends, when the outer phase ends

    def synchronise(hands: Hands) -> None:
        hands.at += pending.pop(0)

    clock, hands = clock_and_hands(synchronise)
    with clock.phase("forward and backward"), clock.phase("reference"):
        hands.at += 1.0
    assert clock.seconds() == {"forward and backward": 3.5, "reference": 1.0}


def test_a_phase_ends_with_the_error_that_leaves_it():
    clock, hands = clock_and_hands()
    with pytest.raises(RuntimeError), clock.phase("saving"):
        hands.at += 1.0
        raise RuntimeError("disk full")
    hands.at += 9.0
    assert clock.seconds() == {"saving": 1.0}


def test_scoring_that_sampling_hides_is_not_seen():
    """Requests from 0 to 3 and from 2 to 6: scoring until 6 is hidden, scoring from 6 to 8 is not."""
    clock, hands = clock_and_hands()

    async def play() -> None:
        first, second = asyncio.Event(), asyncio.Event()

        async def generate(reply: asyncio.Event) -> None:
            await reply.wait()

        sample = clock.while_awaited("rollout", generate)
        one = asyncio.create_task(sample(first))
        await asyncio.sleep(0)
        hands.at = 2.0
        other = asyncio.create_task(sample(second))
        await asyncio.sleep(0)
        hands.at = 3.0
        first.set()
        await one
        hands.at = 6.0
        second.set()
        await other
        hands.at = 8.0

    with clock.phase("rewards"):
        asyncio.run(play())
    assert clock.seconds() == {"rewards": 2.0, "rollout": 6.0}


def test_a_phase_that_nobody_knows_is_refused():
    clock, _ = clock_and_hands()
    with pytest.raises(ValueError, match="forwards"), clock.phase("forwards"):
        pass
