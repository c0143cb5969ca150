"""What a person sees while a run goes on: a live table on a terminal, one line a step elsewhere."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

COLUMNS: tuple[tuple[str, str, str], ...] = (  # header, metric, format
    ("KL", "kl", "{:.3f}"),
    ("mismatch KL", "mismatch_kl", "{:.0e}"),
    ("masked", "masked", "{:.1%}"),
    ("kept ids", "kept_mean", "{:.2f}"),
    ("kept one", "kept_singletons", "{:.0%}"),
    ("routes", "route_coverage", "{:.0%}"),
    ("rollout tok/s", "rollout_tokens_per_s", "{:.0f}"),
    ("train tok/s", "train_tokens_per_s", "{:.0f}"),
    ("s", "seconds", "{:.1f}"),
)


class LiveTable:
    """The last steps of a run, newest at the bottom. Use as a context manager."""

    def __init__(self, domains: Sequence[str], steps: int, console: Console):
        self._domains, self._steps, self._console = domains, steps, console
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
        if self._live:
            self._live.update(self._table(), refresh=True)
            return
        rewards = "  ".join(f"{domain} {_cell(metrics, f'reward/{domain}', '{:.3f}')}" for domain in self._domains)
        others = "  ".join(f"{header} {_cell(metrics, key, form)}" for header, key, form in COLUMNS)
        self._console.print(f"step {metrics['step'] + 1}/{self._steps}  {rewards}  {others}", soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=f"reward by domain, of {self._steps} steps", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        for header in ("step", *self._domains, *(header for header, _, _ in COLUMNS)):
            table.add_column(header, justify="right", overflow="fold", min_width=4)
        for row in self._rows[-15:]:
            rewards = (_cell(row, f"reward/{domain}", "{:.2f}") for domain in self._domains)
            others = (_cell(row, key, form) for _, key, form in COLUMNS)
            table.add_row(str(row["step"] + 1), *rewards, *others)
        return table


def _cell(metrics: Mapping[str, Any], key: str, form: str) -> str:
    """A step in which no group had signal did not train: it has no such figures."""
    return form.format(metrics[key]) if key in metrics else "-"


def held_out_table(before: Mapping[str, float], after: Mapping[str, float], prompts: int) -> Table:
    """Held-out scores per domain, before and after."""
    table = Table(title=f"held-out score ({prompts} prompts a domain)")
    table.add_column("domain")
    for header in ("before", "after", "change"):
        table.add_column(header, justify="right")
    for domain, score in after.items():
        table.add_row(domain, f"{before[domain]:.3f}", f"{score:.3f}", f"{score - before[domain]:+.3f}")
    return table
