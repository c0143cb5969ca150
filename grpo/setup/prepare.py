"""What can be known before the first minute is known here: nothing starts unless all of it holds."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.grpo.config import Config, resolved
from trimtab.grpo.cost.ledger import Beside, Plan, check_table, choose
from trimtab.grpo.cost.shape import shape_of
from trimtab.grpo.policy.lora import check_targets
from trimtab.grpo.policy.policy import check_checkpoint
from trimtab.grpo.sampling import services
from trimtab.grpo.sampling.mixture import chat_of, load_tasks
from trimtab.grpo.setup.grading import check_grading
from trimtab.grpo.setup.models import locate
from trimtab.grpo.setup.rehearsal import STAND_INS, rehearse
from trimtab.grpo.setup.resolve import resolve
from trimtab.grpo.stages.shapes import quickstart_policy
from trimtab.rewards import sandbox
from trimtab.rollout.checkpoint import read_config
from trimtab.rollout.formats.template import vocabulary
from trimtab.rollout.types import POSITIONS


def complete(config: Config, *, trains: bool = True) -> tuple[Config, Plan]:
    """The configuration with every open setting filled in, and how its bytes share the GPU.

    Args:
        trains: false for a policy that only samples.

    Raises:
        ValueError: a checkpoint, format, task, judge or size that cannot be run; in one sentence, with the remedy.
    """
    sandbox.accept_limits_only(config.sandbox == "limits")
    judge = replace(config.judge, checkpoint=_found(config.judge.checkpoint))
    domains = {name: replace(one, teacher=_found(one.teacher)) for name, one in config.domains.items()}
    config = replace(config, model=_found(config.model), judge=judge, domains=domains)
    for checkpoint in filter(None, (config.model, judge.checkpoint, *config.references)):
        check_checkpoint(Path(checkpoint))
    for teacher in filter(None, config.references):
        check_vocabulary(teacher, config.model)
    config = resolve(config, _model(config), gpu=torch.cuda.is_available())
    if config.keep_selection:
        check_selects(_model(config), resolved(config.rollout.max_len))
    if config.lora.rank:
        check_targets(_model(config), config.lora.targets)
    tasks = load_tasks(config, **STAND_INS)
    rehearse(config, tasks, chat_of(config, config.model) if config.model else None)
    check_grading(config, tasks)
    if judge.checkpoint:
        chat_of(config, judge.checkpoint)
    services.check(config)
    plan = plan_memory(config, trains=trains)
    rollout = replace(config.rollout, sleep=plan.sleep, kv_cache_mib=plan.kv_cache_mib)
    config = replace(config, rollout=rollout)
    if config.keep_selection:
        check_table(config, shape_of(_model(config)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return config, plan


def plan_memory(config: Config, *, trains: bool = True) -> Plan:
    """How trainer and engines share the GPU.

    Raises:
        ValueError: they do not fit.
    """
    judges = services.is_needed(config) and not config.judge.model
    judge = shape_of(read_config(config.judge.checkpoint) if config.judge.checkpoint else _model(config))
    gpu_bytes = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    teachers = tuple(shape_of(read_config(teacher)) for teacher in config.references if teacher)
    beside = Beside(judge=judge if judges else None, teachers=teachers, trains=trains)
    return choose(config, shape_of(_model(config)), gpu_bytes, beside=beside)


def check_selects(model: Mapping[str, Any], window: int) -> None:
    """Raises ValueError where there is no selection to keep, or where its positions are too many."""
    if not model.get("index_topk"):
        raise ValueError(f"keep_selection replays what indexers select, and a {_name(model)} has none: leave it out")
    if window > POSITIONS:
        raise ValueError(f"keep_selection keeps 16 bits of a position, so rollout.max_len is at most {POSITIONS}")


def _name(model: Mapping[str, Any]) -> str:
    return str((model.get("architectures") or ["model"])[0])


def check_vocabulary(teacher: str, student: str) -> None:
    """A teacher must speak of the same tokens.

    Raises:
        ValueError: it does not, or the student is still to be made.
    """
    if not student:
        raise ValueError(f"a domain has the teacher {teacher}, so the run needs a model to start from: set model")
    theirs, ours = vocabulary(teacher), vocabulary(student)
    rows = [read_config(model).get("vocab_size") for model in (teacher, student)]
    if theirs == ours and rows[0] == rows[1]:
        return
    if theirs == ours:
        raise ValueError(
            f"the teacher {teacher} has {rows[0]} ids and {student} has {rows[1]}: pad them to the same size"
        )
    different = min(theirs.items() ^ ours.items(), key=lambda one: (one[1], one[0]))
    sizes = f"{len(theirs)} and {len(ours)} tokens" if len(theirs) != len(ours) else f"both of {len(ours)} tokens"
    raise ValueError(
        f"the teacher {teacher} has another vocabulary than {student} ({sizes}; they differ at id {different[1]}): a "
        "KL between them means nothing; take a teacher of the same tokenizer, or distil its answers instead"
    )


def _found(model: str) -> str:
    return str(locate(model)) if model else ""


def _model(config: Config) -> dict[str, Any]:
    """config.json of the policy; of the cold start's, where it is still to be trained."""
    if config.model:
        return read_config(config.model)
    made = quickstart_policy(config.cold_start.vocab_size, bos_id=0, eos_id=1)
    return made.to_dict() | {"architectures": ["DeepseekV32ForCausalLM"]}
