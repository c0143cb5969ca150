import json
import os
import subprocess
import sys

import pytest
from tiny import tiny_model

TRIMTAB = [sys.executable, "-c", "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"]


def trimtab(*words: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([*TRIMTAB, *words], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_help_lists_typed_options():
    done = trimtab("train", "quickstart", "--help")
    assert done.returncode == 0
    for text in ("--group-size INT", "--sampling.top-p FLOAT", "--domains.agent.loss.delta", "--kl {unbiased,k3,full}"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--group-siz", "4"], "--group-siz"),
        (["--group-size", "1"], "group_size must be at least 2"),
        (["--sampling.top-p", "0"], "top_p must lie in"),
        (["--sampling.top-p", "1.2"], "top_p must lie in"),
        (["--sampling.top-k", "0"], "top_k must be at least 1"),
        (["--sampling.temperature", "0"], "temperature must"),
        (["--domains.agent.loss.delta", "-0.1"], "delta must be"),
        (["--steps", "many"], "--steps"),
        (["--model", "nowhere"], "no checkpoint at nowhere"),
        (["--model", "odd"], "architecture OddForCausalLM is not supported"),
        (["--model", "short"], "the model has 64 positions; lower it"),
        (["--model", "mute"], "mute holds no tokenizer"),
    ],
)
def test_a_mistake_ends_in_a_sentence_and_code_2(words, message, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"architectures": ["OddForCausalLM"]}')
    tiny_model("LlamaForCausalLM", max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path / "mute")
    done = trimtab("train", "quickstart", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "no command 'fly'"),
        (["train", "nonsense"], "no recipe named 'nonsense'"),
        (["train", "runs/none", "--resume"], "is not a run"),
    ],
)
def test_an_unknown_target_is_named(words, message, tmp_path):
    done = trimtab(*words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_doctor_says_what_runs_here_and_why_not():
    done = trimtab("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert checks["vLLM"]["ok"] and checks["Keep Routing"]["ok"] and checks["Ray"]["ok"]
    assert all(check["detail"] for check in checks.values())


def test_threads_leave_their_core_before_torch_is_imported():
    code = (
        "import os, sys\n"
        "from trimtab.grpo.commands.cli import SPINS, main\n"
        "assert 'torch' not in sys.modules, 'too late'\n"
        "main(['--help'])\n"
        "assert os.environ['GOMP_SPINCOUNT'] == os.environ.get('OWN', SPINS)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for environment in (clean, clean | {"GOMP_SPINCOUNT": "7", "OWN": "7"}):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
