"""What a person sees while a run goes on: a live table on a terminal, one line a step elsewhere."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from trimtab.grpo.config import Config
from trimtab.grpo.cost.advice import advice
from trimtab.grpo.cost.clock import PHASES
from trimtab.grpo.results.intervals import paired_by_prompt

COLUMNS: tuple[tuple[str, str, str], ...] = (  # header, metric, format
    ("KL", "kl", "{:.3f}"),
    ("mismatch KL", "mismatch_kl", "{:.0e}"),
    ("masked", "masked", "{:.1%}"),
    ("kept ids", "kept_mean", "{:.2f}"),
    ("kept one", "kept_singletons", "{:.0%}"),
    ("routes", "route_coverage", "{:.0%}"),
    ("rollout tok/s", "tokens_per_s/rollout", "{:.0f}"),
    ("train tok/s", "tokens_per_s/train", "{:.0f}"),
    ("MFU", "mfu", "{:.0%}"),
    ("s", "seconds", "{:.1f}"),
)


class LiveTable:
    """The last steps of a run, newest at the bottom. Use as a context manager."""

    def __init__(self, config: Config, console: Console):
        self._config, self._console = config, console
        self._steps = config.steps
        self._domains = [name for name, domain in config.domains.items() if domain.prompts]
        self._advice: str | None = None
        self._rows: list[Mapping[str, Any]] = []
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "LiveTable":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, metrics: Mapping[str, Any]) -> None:
        self._rows.append(metrics)
        before, self._advice = self._advice, advice(metrics, self._config)
        if self._live:
            self._live.update(self._table(), refresh=True)
            return
        rewards = "  ".join(f"{domain} {_cell(metrics, f'reward/{domain}', '{:.3f}')}" for domain in self._domains)
        others = "  ".join(f"{header} {_cell(metrics, key, form)}" for header, key, form in COLUMNS)
        step = f"step {metrics['step'] + 1}/{self._steps}"
        self._console.print("  ".join([step, rewards, others, *details(metrics)]), soft_wrap=True)
        if self._advice and self._advice.partition(":")[0] != (before or "").partition(":")[0]:  # once, not every step
            self._console.print(f"advice: {self._advice}", soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=f"reward by domain, of {self._steps} steps", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        for header in ("step", *self._domains, *(header for header, _, _ in COLUMNS)):
            table.add_column(header, justify="right", overflow="fold", min_width=4)
        for row in self._rows[-15:]:
            rewards = (_cell(row, f"reward/{domain}", "{:.2f}") for domain in self._domains)
            others = (_cell(row, key, form) for _, key, form in COLUMNS)
            table.add_row(str(row["step"] + 1), *rewards, *others)
        advised = [f"advice: {self._advice}"] if self._advice else []
        table.caption = "\n".join([*details(self._rows[-1]), *advised])
        table.caption_justify = "left"
        return table


def details(metrics: Mapping[str, Any]) -> list[str]:
    """What a batch took in seconds, memory and recorded bytes, as far as it is known."""
    return [line for line in (phases(metrics), memory(metrics), recorded(metrics)) if line]


def phases(metrics: Mapping[str, Any]) -> str:
    """Seconds of a batch by phase, the longest first; what is below a hundredth of it is left out."""
    seconds = {name: metrics.get(f"seconds/{name.replace(' ', '_')}", 0.0) for name in PHASES}
    least = sum(seconds.values()) / 100
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.1f} s" for name, value in longest if value > least)


def memory(metrics: Mapping[str, Any]) -> str:
    """Peak GPU memory by owner."""
    names = {"trainer": "memory/trainer_gib", "engine": "memory/engine_gib"}
    return ", ".join(f"{owner} {metrics[key]:.1f} GiB" for owner, key in names.items() if key in metrics)


def recorded(metrics: Mapping[str, Any]) -> str:
    """What routes and masks came to, and what handling them took."""
    names = [name for name in ("routes", "selections", "masks") if metrics.get(f"{name}/bytes")]
    parts = (f"{name} {metrics[f'{name}/bytes'] / 2**20:.1f} MiB" + _took(metrics, name) for name in names)
    return ", ".join(parts)


def _took(metrics: Mapping[str, Any], name: str) -> str:
    key = f"{name}/seconds"
    return f" in {1000 * metrics[key]:.0f} ms" if key in metrics else ""


def _cell(metrics: Mapping[str, Any], key: str, form: str) -> str:
    """A step in which no group had signal did not train: it has no such figures."""
    return form.format(metrics[key]) if key in metrics else "-"


def held_out_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Held-out scores per domain before and after, and the change on the same prompts with its 95 % interval.

    Args:
        before, after: the evaluations of held_out.json.
    """
    table = Table(title=f"held-out score ({after['samples']} answers to a prompt)")
    table.add_column("domain")
    for header in ("prompts", "before", "after", "change", "95 % interval", "tokens"):
        table.add_column(header, justify="right")
    for domain, score in after["score"].items():
        first, last = before["prompts"][domain], after["prompts"][domain]
        shared = len(first.keys() & last.keys())
        change, interval = f"{score - before['score'][domain]:+.3f}", "-"
        if shared > 1:
            middle, low, high = paired_by_prompt(first, last)
            change, interval = f"{middle:+.3f}", f"{low:+.3f} to {high:+.3f}"
        tokens = " → ".join(f"{one['tokens'][domain]:.0f}" if "tokens" in one else "-" for one in (before, after))
        table.add_row(domain, str(shared), f"{before['score'][domain]:.3f}", f"{score:.3f}", change, interval, tokens)
    return table
