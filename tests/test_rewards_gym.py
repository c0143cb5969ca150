import json
from fractions import Fraction

import pytest
import reasoning_gym

from trimtab.rewards.gym import gym_verifier
from trimtab.rewards.types import VerifierError


@pytest.mark.parametrize("name", ["gcd", "basic_arithmetic", "countdown", "sudoku", "rotate_matrix", "knights_knaves"])
def test_a_verifier_by_name_marks_entries_that_went_through_a_file(name):
    verify = gym_verifier(name)
    for entry in reasoning_gym.create_dataset(name, seed=1, size=3):
        stored = json.loads(json.dumps(entry))
        assert verify(entry["answer"], stored) == 1.0
        assert verify("no idea", stored) < 1.0


def test_an_unknown_dataset_and_an_entry_without_metadata_are_refused():
    with pytest.raises(ValueError, match="no dataset 'gdc'"):
        gym_verifier("gdc")
    with pytest.raises(ValueError, match="gcd lacks answer, metadata"):
        gym_verifier("gcd")("3", {"question": "?"})


def test_an_answer_at_which_the_verifier_breaks_has_no_mark_and_a_broken_verifier_says_nothing():
    (entry,) = reasoning_gym.create_dataset("prime_factorization", seed=1, size=1)
    assert gym_verifier("prime_factorization")("two times three", entry) == 0.0
    (entry,) = reasoning_gym.create_dataset("sudoku", seed=1, size=1)
    with pytest.raises(VerifierError, match="breaks at its own answer"):
        gym_verifier("sudoku")("x", entry | {"metadata": {}})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("complex_arithmetic", "nan"),
        ("complex_arithmetic", "nan + nani"),
        ("game_of_life_halting", "no idea"),
        ("coin_flip", "0"),
        ("coin_flip", "0.1"),
        ("gsm_symbolic", "{answer} or 7"),
        ("gsm_symbolic", "{answer}, 7"),
        ("gsm_symbolic", "{answer}\n7"),
        ("sokoban", "{answer} or {answer}R"),
        ("knights_knaves", "{answer} or both are knaves"),
        ("simple_integration", "{answer} or 7*x"),
        ("fraction_simplification", "{answer}; 7"),
        ("spell_backward", "{answer}, drow"),
    ],
)
def test_what_is_no_answer_and_what_hedges_never_has_the_full_mark(name, wrong):
    verify = gym_verifier(name)
    for entry in reasoning_gym.create_dataset(name, seed=2, size=8):
        assert verify(wrong.format(answer=entry["answer"]), entry) < 1.0
        assert verify(entry["answer"], entry) == 1.0


def test_a_loose_verifier_takes_the_truth_in_other_forms_still():
    (entry,) = reasoning_gym.create_dataset("coin_flip", seed=0, size=1)
    assert gym_verifier("coin_flip")(str(Fraction(entry["answer"])), entry) == 1.0
    (entry,) = reasoning_gym.create_dataset("complex_arithmetic", seed=0, size=1)
    assert gym_verifier("complex_arithmetic")(entry["answer"].replace(".0", "").replace(" ", ""), entry) == 1.0
    (entry,) = reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=1)
    assert gym_verifier("gsm_symbolic")(f"So the answer is {entry['answer']}", entry) == 1.0
