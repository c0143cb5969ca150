"""A run's settings, complete: what a recipe leaves open comes from the model and the machine."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trimtab.grpo.config import Config, Domain, resolved

LONGEST_WINDOW = 8192
"""Tokens of a window that nobody asked for: longer ones cost memory that most tasks never use."""


def resolve(config: Config, checkpoint: Mapping[str, Any], *, gpu: bool) -> Config:
    """The configuration with every open setting filled in; what is set stays.

    Args:
        checkpoint: config.json of the model.
        gpu: whether the policy trains and samples on a GPU.

    Raises:
        ValueError: a window longer than the model has positions.
    """
    positions = checkpoint.get("max_position_embeddings")
    window = config.rollout.max_len or min(positions or LONGEST_WINDOW, LONGEST_WINDOW)
    if positions and window > positions:
        raise ValueError(f"rollout.max_len is {window}, but the model has {positions} positions; lower it")
    graphs = gpu if config.rollout.graphs is None else config.rollout.graphs
    if graphs and not gpu:
        raise ValueError("rollout.graphs is true, but there is no GPU: leave it out")
    return with_lengths(
        replace(
            config,
            precision=config.precision or ("bf16" if gpu else "fp32"),
            rollout=replace(config.rollout, max_len=window, graphs=graphs),
        )
    )


def with_lengths(config: Config) -> Config:
    """The configuration with the limits of the length penalty, which follow from what a turn may sample."""
    budget = config.sampling.max_tokens or resolved(config.rollout.max_len)
    domains = {name: _with_length(domain, budget) for name, domain in config.domains.items()}
    return replace(config, domains=domains)


def _with_length(domain: Domain, budget: int) -> Domain:
    hard = domain.length_hard or max(budget, (domain.length_soft or 0) + 1)
    return replace(domain, length_hard=hard, length_soft=domain.length_soft or max(hard * 3 // 4, 1))
