import json

import pytest
import reasoning_gym

from trimtab.rewards.gym import gym_verifier


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


def test_an_answer_on_which_the_verifier_breaks_has_no_mark():
    (entry,) = reasoning_gym.create_dataset("sudoku", seed=1, size=1)
    assert gym_verifier("sudoku")("x", entry | {"metadata": {}}) == 0.0
