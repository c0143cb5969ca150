import json
from dataclasses import replace
from math import sqrt

import pytest

from trimtab.grpo.commands.check import check, read_run
from trimtab.grpo.recipes import quickstart, smollm2
from trimtab.grpo.results.curve import MARGIN, WIDTH, Band, Curve, RunRecord, bands, curve_for, judge, measure, smoothed

STEPS = 20
CONFIG = replace(smollm2(), steps=STEPS)


def rise(step: int) -> float:
    return 0.9 * step / STEPS


def run(*, seed: int = 0, add: float = 0.0, after: float = 0.8, steps: int = STEPS) -> RunRecord:
    metrics = tuple({"step": step, "reward/sums": rise(step) + add} for step in range(steps))
    return RunRecord(replace(CONFIG, seed=seed, out=f"runs/{seed}"), metrics, {"sums": 0.05}, {"sums": after})


@pytest.fixture
def curve() -> Curve:
    runs = [run(seed=seed, add=0.01 * (seed - 1), after=0.79 + 0.01 * seed) for seed in (0, 1, 2)]
    return measure(runs, recipe="smollm2", machine="a machine", made="a command")


def test_a_reward_is_smoothed_by_the_mean_of_the_last_five_steps():
    assert smoothed([0, 1, 0, 1, 0, 5]) == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2, 2 / 5, 7 / 5])


def test_a_band_is_the_mean_with_the_spread_of_one_more_run():
    # three runs at 0, 3, 6: mean 3, variance 9, and a further run against the mean of three: 9 * (1 + 1/3) = 12
    (band,) = bands([[0.0], [3.0], [6.0]])
    assert (band.low, band.high) == pytest.approx((3 - WIDTH * sqrt(12), 3 + WIDTH * sqrt(12)))
    assert bands([[0.5], [0.5]]) == (Band(0.5 - MARGIN, 0.5 + MARGIN),)


def test_the_spread_is_pooled_with_the_steps_around():
    # variances 0, 18 (of 0 and 6) and 0 over two runs: their mean is 6 at every step
    found = bands([[0.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    assert [band.high - band.low for band in found] == pytest.approx([2 * WIDTH * sqrt(6 * 1.5)] * 3)


@pytest.mark.parametrize(
    ("add", "after", "follows", "said"),
    [
        (0.0, 0.8, True, []),
        (-0.3, 0.8, False, ["below"]),
        (0.3, 0.8, False, ["above"]),
        (0.0, 0.2, False, ["held out after: sums 0.200 is below"]),
    ],
)
def test_a_run_lies_in_the_band_or_is_told_where_it_leaves_it(curve, add, after, follows, said):
    verdict = judge(curve, run(seed=7, add=add, after=after))
    assert verdict.follows == follows and verdict.steps == STEPS
    assert bool(verdict.outside) == bool(said)
    assert all(word in verdict.outside[0] for word in said)
    if add:
        assert [line.split(":")[0] for line in verdict.outside] == [f"step {i + 1}" for i in range(STEPS)]


def test_one_step_of_twenty_may_lie_outside(curve):
    late = run()
    metrics = (*late.metrics[:-1], {"step": STEPS - 1, "reward/sums": rise(STEPS - 1) - 1.0})
    verdict = judge(curve, replace(late, metrics=metrics))
    assert verdict.follows and len(verdict.outside) == 1


def test_a_run_under_way_is_compared_as_far_as_it_has_come(curve):
    assert judge(curve, replace(run(steps=8), after={})).steps == 8
    with pytest.raises(ValueError, match="too short to tell: 4 steps, and 5 are needed"):
        judge(curve, run(steps=4))


def test_a_curve_survives_being_saved_and_applies_whatever_the_seed_the_folder_and_the_precision(curve, tmp_path):
    curve.save(tmp_path / "smollm2.json")
    assert Curve.load(tmp_path / "smollm2.json") == curve
    elsewhere = replace(CONFIG, seed=9, out="runs/x", precision="fp32", rollout=replace(CONFIG.rollout, actors=2))
    assert curve_for(elsewhere, tmp_path) == curve


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, lr=1e-6), "does not apply to this run: lr is 1e-06 and not 2e-05"),
        (replace(CONFIG, steps=2), "steps is 2 and not 20"),
        (quickstart(), "no expected curve for a run over reasoning, agent, alignment: there are curves for smollm2"),
    ],
)
def test_a_curve_is_not_applied_to_other_settings_or_recipes(curve, config, message, tmp_path):
    curve.save(tmp_path / "smollm2.json")
    with pytest.raises(ValueError, match=message):
        curve_for(config, tmp_path)


def test_the_converters_hash_in_the_models_folder_makes_no_difference(curve, tmp_path):
    before, after = (replace(CONFIG, model=f"runs/SmolLM2-{digits}") for digits in ("0123456789", "abcdefabcd"))
    measured = measure(
        [replace(run(seed=s), config=replace(before, seed=s)) for s in (0, 1)], recipe="r", machine="m", made="c"
    )
    measured.save(tmp_path / "r.json")
    assert curve_for(after, tmp_path) == measured


def test_no_curve_yet_is_said(tmp_path):
    with pytest.raises(ValueError, match="none was measured yet"):
        curve_for(CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run()], "two runs or more"),
        ([run(), replace(run(), config=replace(CONFIG, lr=1e-6))], "nothing but their seeds"),
        ([run(), run(steps=3)], "finished runs"),
    ],
)
def test_a_curve_is_measured_from_finished_runs_of_one_recipe(runs, message):
    with pytest.raises(ValueError, match=message):
        measure(runs, recipe="smollm2", machine="", made="")


def write(path, record: RunRecord, *, torn: str = ""):
    path.mkdir()
    record.config.save(path / "config.json")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in record.metrics) + torn)
    held_out = {"before": {"score": record.before}, "after": {"score": record.after}}
    (path / "held_out.json").write_text(json.dumps(held_out))
    return path


@pytest.mark.parametrize(("add", "code", "said"), [(0.0, 0, "lies in the band"), (-0.3, 1, "leaves the band")])
def test_the_command_reads_a_run_and_ends_with_its_verdict(curve, add, code, said, tmp_path, capsys):
    curve.save(tmp_path / "curves" / "smollm2.json")
    folder = write(tmp_path / "run", run(seed=5, add=add))
    assert check(folder, tmp_path / "curves") == code
    out = capsys.readouterr().out
    assert said in out and "3 seeds on a machine" in out and ("and 10 more" in out) == bool(add)


def test_a_line_that_is_being_written_is_left_for_later_and_odd_separators_cut_nothing(tmp_path):
    odd = replace(run(steps=6), metrics=({"step": 0, "reward/sums": 0.5, "note": "a\u2028b\u0085c"},))
    text = json.dumps(odd.metrics[0], ensure_ascii=False)
    folder = write(tmp_path / "run", replace(odd, metrics=()), torn=text + "\n" + text[:20])
    assert read_run(folder).metrics == odd.metrics


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        check(tmp_path)
