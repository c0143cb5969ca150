"""What may change when a run goes on, and what did."""

from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from trimtab.grpo.config import flat

MAY_CHANGE = (
    *("out", "steps", "group_size", "minibatches", "tokens_per_microbatch", "offload", "checkpoint_activations"),
    *("lr", "warmup_steps", "lr_end_share", "weight_decay", "max_grad_norm", "indexer_kl"),
    *("epochs", "plateau"),
    *("save_every", "run_gib", "trackers", "sandbox", "rollout.*", "sampling.*", "judge.*", "lora.merge"),
    *(f"domains.*.{name}" for name in ("prompts", "weights.*", "loss.*", "length", "length_soft", "length_hard")),
    *(f"domains.*.{name}" for name in ("floor", "max_lost", "open_environments", "*_seconds")),
    *(f"domains.*.{name}" for name in ("max_turns", "context.*", "group_rewards.*", "process_rewards.*")),
)
"""Names of settings, * for any part: everything else is what the steps before were trained with, and stays."""


def changes(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """The settings of two dataclasses of one kind that differ, by dotted name, with both values.

    Raises:
        ValueError: one of them may not change when a run goes on.
    """
    old, new = flat(asdict(before)), flat(asdict(after))
    found = {
        name: (old.get(name), new.get(name)) for name in (old | new) if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    }
    fixed = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in MAY_CHANGE)]
    if fixed:
        name = fixed[0]
        raise ValueError(
            f"{name} was {found[name][0]!r} and cannot become {found[name][1]!r} when a run goes on: leave it out, or "
            "start a new run"
        )
    return found


_ABSENT = object()
