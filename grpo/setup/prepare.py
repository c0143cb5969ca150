"""What can be known before the first minute is known here: nothing starts unless all of it holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.grpo import services
from trimtab.grpo.config import Config
from trimtab.grpo.cost.ledger import Plan, choose
from trimtab.grpo.cost.shape import shape_of
from trimtab.grpo.mixture import chat_of, load_tasks
from trimtab.grpo.policy.lora import check_targets
from trimtab.grpo.policy.policy import check_checkpoint
from trimtab.grpo.setup.grading import check_grading
from trimtab.grpo.setup.models import locate
from trimtab.grpo.setup.rehearsal import STAND_INS, rehearse
from trimtab.grpo.setup.resolve import resolve
from trimtab.grpo.stages.cold_start import quickstart_policy
from trimtab.rewards import sandbox
from trimtab.rollout.checkpoint import read_config


def complete(config: Config) -> tuple[Config, Plan]:
    """The configuration with every open setting filled in, and how its bytes share the GPU.

    Raises:
        ValueError: a checkpoint, format, task, judge or size that cannot be run; in one sentence, with the remedy.
    """
    sandbox.accept_limits_only(config.sandbox == "limits")
    judge = replace(config.judge, checkpoint=_found(config.judge.checkpoint))
    config = replace(config, model=_found(config.model), judge=judge)
    for checkpoint in filter(None, (config.model, judge.checkpoint)):
        check_checkpoint(Path(checkpoint))
    config = resolve(config, _model(config), gpu=torch.cuda.is_available())
    if config.lora.rank:
        check_targets(_model(config), config.lora.targets)
    tasks = load_tasks(config, **STAND_INS)
    rehearse(config, tasks, chat_of(config, config.model) if config.model else None)
    check_grading(config, tasks)
    if judge.checkpoint:
        chat_of(config, judge.checkpoint)
    services.check(config)
    plan = plan_memory(config)
    rollout = replace(config.rollout, sleep=plan.sleep, kv_cache_mib=plan.kv_cache_mib)
    return replace(config, rollout=rollout), plan


def plan_memory(config: Config) -> Plan:
    """How trainer and engines share the GPU.

    Raises:
        ValueError: they do not fit.
    """
    judges = services.is_needed(config) and not config.judge.model
    judge = shape_of(read_config(config.judge.checkpoint) if config.judge.checkpoint else _model(config))
    gpu_bytes = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return choose(config, shape_of(_model(config)), gpu_bytes, judge=judge if judges else None)


def _found(model: str) -> str:
    return str(locate(model)) if model else ""


def _model(config: Config) -> dict[str, Any]:
    """config.json of the policy; of the cold start's, where it is still to be trained."""
    if config.model:
        return read_config(config.model)
    made = quickstart_policy(config.cold_start.vocab_size, bos_id=0, eos_id=1)
    return made.to_dict() | {"architectures": ["DeepseekV32ForCausalLM"]}
