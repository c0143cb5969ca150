"""Supervised stages: exact losses, parameters that only their own loss reaches, runs that end and go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import INDEXED, save_tiny, save_tiny_deepseek
from transformers import DeepseekV32ForCausalLM

from trimtab.grpo.commands.cli import main
from trimtab.grpo.cost.shape import shape_of
from trimtab.grpo.policy import selection
from trimtab.grpo.policy.policy import load_policy
from trimtab.grpo.recipes import STAGES
from trimtab.grpo.stages.config import Supervised
from trimtab.grpo.stages.data import Tokens, batches, packs, read_conversations, read_texts
from trimtab.grpo.stages.memory import check_memory, need
from trimtab.grpo.stages.supervised import SupervisedTrainer, on_plateau
from trimtab.grpo.start import load_settings
from trimtab.rollout.formats.template import load_format

WORDS = ["the", "cat", "sat", "on", "mat", "and", "ran", "home", "then", "12", "47", "again"]
CPU = torch.device("cpu")
TRIMTAB = [sys.executable, "-c", "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"]


def sequences(*lengths: int, seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [Tokens(rng.integers(0, 360, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths]


def write_texts(path: Path, rows: int = 40, words: int = 50) -> str:
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(rng.choices(WORDS, k=words))}) for _ in range(rows))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def trainer(checkpoint: Path, **settings) -> SupervisedTrainer:
    """One whose step is plain gradient descent."""
    made = SupervisedTrainer(Supervised(**settings), load_policy(checkpoint), device=CPU)
    made.optimizers = [torch.optim.SGD(made.learning, lr=0.0)]
    made.optimizers[0].zero_grad = lambda: None
    return made


def gradients(checkpoint: Path, batch: list[Tokens], **settings) -> dict[str, torch.Tensor]:
    made = trainer(checkpoint, max_grad_norm=1e9, **settings)
    made.train_on(batch, 0)
    return {name: weight.grad for name, weight in made.policy.named_parameters() if weight.grad is not None}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sparse")
    save_tiny_deepseek(path)
    return path


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_loss_and_gradient_are_the_weighted_cross_entropy_of_transformers(sparse, prompt_weight):
    """Within index_topk = 16 keys, where transformers' own sparse attention has nothing to choose."""
    batch = sequences(5, 16, 11)
    ours = trainer(sparse, prompt_weight=prompt_weight, max_grad_norm=1e9, tokens_per_microbatch=20)
    model = DeepseekV32ForCausalLM.from_pretrained(sparse, dtype=torch.float32).eval()
    total, weight = torch.zeros(()), 0.0
    for one in batch:
        ids_N = torch.from_numpy(one.ids_N).long()
        weight_N = torch.where(torch.from_numpy(one.asked_N), 1.0, prompt_weight)[1:]
        logits_NV = model(ids_N[None]).logits[0, :-1]
        total = total + (F.cross_entropy(logits_NV, ids_N[1:], reduction="none") * weight_N).sum()
        weight += float(weight_N.sum())
    loss = total / weight
    loss.backward()
    assert ours.train_on(batch, 0)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    theirs = dict(model.named_parameters())
    for name, parameter in ours.policy.model.named_parameters():
        if ".indexer." not in name:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_a_batch_is_the_same_however_it_is_cut(sparse, dense):
    batch = sequences(40, 7, 25, 60, 3)
    whole = gradients(sparse, batch, dense_attention=dense, tokens_per_microbatch=1000)
    cut = gradients(sparse, batch, dense_attention=dense, tokens_per_microbatch=1)
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_neither_loss_reaches_the_parameters_of_the_other(sparse, dense):
    """With the indexer's loss or without, the model's gradients have the same bits; and the other way round."""
    batch = sequences(40, 25)
    both = gradients(sparse, batch, dense_attention=dense)
    model = gradients(sparse, batch, dense_attention=dense, indexer_kl=0.0)
    indexer = gradients(sparse, batch, dense_attention=dense, learns="indexer")
    assert model.keys() | indexer.keys() == both.keys() and not model.keys() & indexer.keys()
    assert all(".indexer." in name for name in indexer) and len(indexer) == 3 * 5
    for name, gradient in both.items():
        assert (gradient == (indexer if name in indexer else model)[name]).all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("at_once", [1, 2000, 1 << 25])
def test_the_selected_mass_is_the_dense_attention_of_transformers_on_the_selected_keys(tmp_path, monkeypatch, at_once):
    """An indexer without queries scores all keys 0, and of equals the 16 earliest are selected."""
    monkeypatch.setattr(selection, "AT_ONCE", at_once)
    save_tiny(tmp_path / "dense", "DeepseekV3ForCausalLM")
    model = save_tiny_deepseek(tmp_path / "sparse")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.indexer.wq_b.weight)
    model.config.index_topk = 64
    model.save_pretrained(tmp_path / "sparse")
    policy = load_policy(tmp_path / "sparse")
    policy.config.index_topk = 16
    lengths = (40, 10, 33)
    ids_N = torch.from_numpy(np.concatenate([one.ids_N for one in sequences(*lengths)])).long()
    call = partial(policy, ids_N, torch.tensor([0, 40, 50, 83]), dense_attention=True, with_indexer_kl=True)
    with torch.no_grad(), selection.measuring_selection(policy) as mass:
        measured = call()
    with torch.no_grad():
        plain = call()
    torch.testing.assert_close(measured.hidden_ND, plain.hidden_ND, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.indexer_kl_N, plain.indexer_kl_N, rtol=1e-4, atol=1e-5)
    wholly = DeepseekV32ForCausalLM.from_pretrained(tmp_path / "sparse", attn_implementation="eager").eval()
    found = [[] for _ in range(3)]
    for ids in ids_N.split(lengths):
        attention = wholly(ids[None], output_attentions=True).attentions
        for layer, prob_1HTM in enumerate(attention):
            found[layer].append(prob_1HTM[0, :, 16:, :16].sum(-1).mean(0))
    expected = [torch.cat(parts).mean().item() for parts in found]
    assert mass.by_layer() == pytest.approx(expected, rel=1e-4)
    assert policy.packed is None and policy.choose_attend is None


def test_batches_are_decided_by_seed_and_number_and_leave_nothing_out():
    data = sequences(*range(2, 12))
    stream = batches(data, tokens=15, seed=1)
    first = [next(stream) for _ in range(8)]
    later = batches(data, tokens=15, seed=1, start=5)
    assert [[id(one) for one in next(later)] for _ in range(3)] == [[id(one) for one in batch] for batch in first[5:]]
    seen = [id(one) for batch in first for one in batch]
    assert sorted(seen[: len(data)]) == sorted(map(id, data))
    for batch in first:
        assert sum(len(one.ids_N) for one in batch[:-1]) < 15 <= sum(len(one.ids_N) for one in batch)
        cut = packs(batch, 12)
        assert sorted(map(id, (one for pack in cut for one in pack))) == sorted(map(id, batch))
        assert all(len(pack) == 1 or sum(len(one.ids_N) for one in pack) <= 12 for pack in cut)


def test_texts_are_cut_into_sequences_and_their_ends_are_marked(sparse, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "the cat"}\n{"text": ""}\n{"body": 1}\n{"text": "12 then 47 again"}\n')
    corpus = read_texts([str(file)], model=sparse, field="text", max_len=4, held_out=1)
    chat = load_format(sparse)
    whole = [id for one in corpus.train for id in one.ids_N.tolist()]
    assert whole[0] == chat.bos_id and whole[-1] == chat.eos_id and all(len(one.ids_N) <= 4 for one in corpus.train)
    assert not any(one.asked_N[0] or not one.asked_N[1:].all() for one in (*corpus.train, *corpus.held_out))
    assert corpus.rows == 4 and len(corpus.left_out) == 2
    assert f"{file}:2" in corpus.left_out[0] and "'text' is missing" in corpus.left_out[1]


CONVERSATION = [{"role": "user", "content": "12 + 35?"}, {"role": "assistant", "content": "47"}]
CALL = {"id": "a", "type": "function", "function": {"name": "put", "arguments": '{"key": "x"}'}}


def test_conversations_ask_for_what_assistants_say(sparse, tmp_path):
    file = tmp_path / "chats.jsonl"
    tools = [{"type": "function", "function": {"name": "put", "description": "", "parameters": {"type": "object"}}}]
    rows = [
        {"messages": CONVERSATION},
        {"messages": [*CONVERSATION[:1], {"role": "assistant", "content": "47", "reasoning_content": "apple"}]},
        {"messages": CONVERSATION, "thinking": False},
        {
            "messages": [
                {"role": "system", "content": "yes", "tools": tools},
                {"role": "user", "content": "put x"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "a", "content": "no"},
                {"role": "assistant", "content": "yes"},
            ]
        },
        {"messages": [CONVERSATION[0]]},
        {"messages": [*CONVERSATION[:1], {"role": "assistant", "content": "cat " * 2000}]},
        {"messages": CONVERSATION, "thinking": "no"},
        {"messages": CONVERSATION},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read_conversations([str(file)], model=sparse, field="messages", max_len=1024, held_out=1, thinking=True)
    chat = load_format(sparse)
    said = [chat.decode(one.ids_N[one.asked_N].tolist()) for one in corpus.train]
    assert [text.count("47") for text in said] == [1, 1, 1, 0] and "apple" in said[1]
    assert "put" in said[3] and "yes" in said[3] and "no" not in said[3]
    reasons = " | ".join(corpus.left_out)
    for reason in ("no assistant says anything", "more than max_len = 1024", "'thinking' must be true or false"):
        assert reason in reasons
    assert len(corpus.left_out) == 3 and len(corpus.held_out) == 1


def test_a_plateau_is_a_window_that_is_not_one_percent_below_the_one_before():
    falling = [1.0 - 0.01 * i for i in range(40)]
    assert not on_plateau(falling, 10) and not on_plateau([1.0] * 19, 10)
    assert on_plateau([1.0] * 20, 10) and on_plateau([*falling, *[0.6] * 20], 10)
    assert on_plateau([1.0] * 10 + [0.995] * 10, 10) and not on_plateau([1.0] * 10 + [0.98] * 10, 10)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_survives_its_file(name, tmp_path):
    settings = STAGES[name]()
    (tmp_path / "config.json").write_text(settings.to_json())
    assert load_settings(tmp_path / "config.json") == settings


def test_a_stage_that_does_not_fit_is_refused_with_what_would_make_it_fit():
    shape = shape_of(INDEXED | {"architectures": ["DeepseekV32ForCausalLM"], "num_key_value_heads": 4})
    settings = Supervised(max_len=512, precision="bf16", tokens_per_microbatch=8192)
    enough = need(settings, shape)
    check_memory(settings, shape, enough)
    assert need(replace(settings, learns="indexer"), shape) < enough, "the frozen have no moments and no gradients"
    with pytest.raises(ValueError, match=r"this GPU has .*; with --checkpoint-activations it needs"):
        check_memory(settings, shape, need(replace(settings, offload="optimizer"), shape))
    smallest = replace(settings, offload="optimizer", checkpoint_activations=True, tokens_per_microbatch=512)
    assert need(smallest, shape) < 0.9 * enough
    with pytest.raises(ValueError, match="take a GPU of 1 GiB or a smaller model"):
        check_memory(settings, shape, need(smallest, shape) - 1)


def train(*words: str, cwd: Path, timeout: float = 180) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TRIMTAB, "train", *words], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment
    )


QUICK = ("--data", "texts.jsonl", "--tokens-per-step", "300", "--held-out", "4", "--lr", "1e-3")


def final(run: Path) -> dict[str, torch.Tensor]:
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    return load_file(newest / "model.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_warm_up_changes_the_indexer_alone_and_brings_it_to_where_attention_looks(sparse, tmp_path, precision):
    write_texts(tmp_path / "texts.jsonl")
    options = ("--model", str(sparse), "--steps", "15", "--out", "run", "--precision", precision)
    done = train("warm_up", *QUICK, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = load_file(sparse / "model.safetensors"), final(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert (".indexer." in name) != bool((after[name] == weight).all()), name
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert held_out["after"]["indexer_kl"] < 0.9 * held_out["before"]["indexer_kl"]
    if precision == "fp32":
        assert held_out["after"]["loss_dense"] == held_out["before"]["loss_dense"]


@pytest.mark.parametrize("words", [(), ("--optimizer", "muon"), ("--optimizer", "muon", "--precision", "bf16")])
def test_pre_training_starts_from_nothing_and_learns(sparse, tmp_path, words):
    write_texts(tmp_path / "texts.jsonl")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "shape").mkdir(exist_ok=True)
        (tmp_path / "shape" / name).write_bytes((sparse / name).read_bytes())
    options = ("--model", "shape", "--random-weights", "--steps", "25", "--out", "run", "--lr", "1e-2")
    done = train("pretrain", *QUICK, *options, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert held_out["before"]["loss"] > 5.5 and held_out["after"]["loss"] < 4.0
    assert load_policy(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]).sparse


def test_a_stage_stops_on_a_plateau(sparse, tmp_path):
    write_texts(tmp_path / "texts.jsonl")
    options = ("--model", str(sparse), "--steps", "200", "--out", "run", "--plateau", "3", "--lr", "1e-9")
    done = train("warm_up", *QUICK[:-2], *options, cwd=tmp_path)
    assert done.returncode == 0 and "has come to rest" in done.stdout, done.stderr
    steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert steps < 40 and (tmp_path / "run" / "checkpoints" / f"step-{steps:05d}").is_dir()


def test_a_full_disk_is_told_at_the_end_and_the_stage_goes_on_when_there_is_room(sparse, tmp_path, small_disk):
    """Lines fit into its 256 KiB, no checkpoint does."""
    write_texts(tmp_path / "texts.jsonl")
    run = small_disk / "run"
    done = train("sparse", *QUICK, "--model", str(sparse), "--steps", "3", "--out", str(run), cwd=tmp_path)
    assert done.returncode == 1 and "the stage is over, but its folder has no last checkpoint; make room" in done.stderr
    assert "the checkpoint of step 3 could not be written" in done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = train(str(run), "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (run / "checkpoints" / "step-00003").is_dir()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_stage_that_is_killed_goes_on_to_the_same_weights(sparse, tmp_path, seed):
    """SIGKILL at a random moment, checkpoints included; then --resume. Without it: the same, to the bit."""
    write_texts(tmp_path / "texts.jsonl")
    options = ("--model", str(sparse), "--steps", "12", "--save-every", "2")
    assert train("sparse", *QUICK, *options, "--out", "whole", cwd=tmp_path).returncode == 0
    begun = subprocess.Popen(
        [*TRIMTAB, "train", "sparse", *QUICK, *options, "--out", "cut"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    rng, metrics = random.Random(seed), tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_bytes().splitlines()) >= rng.choice((3, 6))):
        assert time.monotonic() < deadline and begun.poll() is None
        time.sleep(0.01)
    time.sleep(0.1 * rng.random())
    begun.send_signal(signal.SIGKILL)
    assert begun.wait() == -signal.SIGKILL
    done = train("cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    def rows(run: str) -> list[dict]:
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if "second" not in k and "_per_s" not in k} for line in lines
        ]

    assert rows("cut") == rows("whole")
    one, other = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert all((one[name] == other[name]).all() for name in one)
    history = (tmp_path / "cut" / "history.jsonl").read_text().splitlines()
    assert len(history) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--data", "texts.jsonl"], "model is empty"),
        (["sft", "--model", "sparse"], "data is empty"),
        (["pretrain", "--model", "sparse", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["pretrain", "--model", "sparse", "--data", "texts.csv"], "rows are read from .jsonl and .parquet"),
        (["sft", "--model", "sparse", "--data", "texts.jsonl"], "field 'messages' is missing"),
        (["pretrain", "--model", "sparse", "--data", "texts.jsonl", "--held-out", "40"], "40 of them are held out"),
        (["pretrain", "--model", "sparse", "--data", "texts.jsonl", "--max-len", "600"], "512 positions; lower it"),
        (["warm_up", "--model", "llama", "--data", "texts.jsonl"], "has no indexer; `trimtab convert llama"),
        (
            ["warm_up", "--model", "sparse", "--data", "texts.jsonl", "--held-out", "9", "--max-len", "16"],
            "nothing is ever left out",
        ),
        (["warm_up", "--model", "sparse", "--data", "texts.jsonl", "--indexer-kl", "0"], "nothing would learn"),
        (["sft", "--model", "nowhere", "--data", "texts.jsonl"], "no checkpoint at nowhere"),
        (["pretrain", "--model", "sparse", "--data", "texts.jsonl", "--out", "sparse"], "exists already"),
        (["sft", "--check"], "has no rewards"),
        (["sparse/config.json", "--resume"], "is not a run"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(words, message, sparse, tmp_path, monkeypatch, capsys):
    write_texts(tmp_path / "texts.jsonl", rows=40)
    (tmp_path / "texts.csv").write_text("text\n")
    (tmp_path / "sparse").symlink_to(sparse)
    save_tiny(tmp_path / "llama", "LlamaForCausalLM")
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["train", *words]) == 2
    except SystemExit as left:  # tyro's way out, for what it reads itself
        assert left.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
