"""What the packs of a step gave, left on the device until the step is over: reading it makes the host wait."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trimtab.grpo.batch import Packed
from trimtab.grpo.estimators import GrpoLoss, mismatch_kl


@dataclass(slots=True)
class Record:
    """The losses of a step, pack by pack."""

    losses: list[GrpoLoss] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    """Of each trajectory."""
    entropy_B: list[Tensor] = field(default_factory=list)
    indexer_kl: list[Tensor] = field(default_factory=list)
    """Sum over a pack's tokens, and how many they are."""
    mismatch_S: list[Tensor] = field(default_factory=list)
    """log(pi / pi_old) where the weights are still those that sampled."""
    norms: list[tuple[float, float]] = field(default_factory=list)
    """Of the policy's gradient and of the indexer's, before they are clipped."""
    _columns: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, packed: Packed, loss: GrpoLoss, entropy_S: Tensor, indexer_kl_N: Tensor | None) -> None:
        self.losses.append(loss.without_graph())
        self.domains += packed.domains
        sums_B = torch.zeros_like(packed.advantage_B).index_add(0, packed.sequence_S, entropy_S.float())
        self.entropy_B.append(sums_B / packed.length_B)
        if indexer_kl_N is not None:
            total = indexer_kl_N.detach().sum()
            self.indexer_kl.append(torch.stack([total, torch.full_like(total, len(indexer_kl_N))]))

    def of_domain(self, name: str, domain: str | None) -> np.ndarray:
        """A column of the trajectories, [B] float32: kl, masked, clip_share, clip_low_share, drift or entropy.

        Args:
            domain: of which; None: of all.
        """
        if not self._columns:
            self._columns = self._read()
        column_B = self._columns[name]
        return column_B if domain is None else column_B[[one == domain for one in self.domains]]

    def _read(self) -> dict[str, np.ndarray]:
        def joined(name: str) -> Tensor:
            return torch.cat([getattr(loss, name) for loss in self.losses]).float()

        columns = {
            "kl": joined("kl_B"),
            "masked": 1 - joined("keep_B"),
            "clip_share": joined("clip_share_B"),
            "clip_low_share": joined("clip_low_share_B"),
            "drift": joined("drift_B"),
            "entropy": torch.cat(self.entropy_B),
        }
        return dict(zip(columns, torch.stack([*columns.values()]).cpu().numpy(), strict=True))

    def metrics(self) -> dict[str, float]:
        """Means over trajectories, of all and by domain (kl/DOMAIN, ...), the drift's percentiles, the mismatch."""
        found: dict[str, float] = {}
        for domain in (None, *dict.fromkeys(self.domains)):
            end = "" if domain is None else f"/{domain}"
            for name in ("kl", "masked", "clip_share", "clip_low_share", "entropy"):
                found[name + end] = float(self.of_domain(name, domain).mean())
            drift_B = self.of_domain("drift", domain)
            for q in (50, 90, 99) if domain is None else (99,):
                found[f"drift_p{q}{end}"] = float(np.quantile(drift_B, q / 100))
        log_ratio_S = torch.cat(self.mismatch_S)
        found["mismatch_kl"] = float(mismatch_kl(log_ratio_S, torch.zeros_like(log_ratio_S)).mean())
        found["mismatch_log_ratio_max"] = float(log_ratio_S.abs().max())
        found["grad_norm"], found["indexer_grad_norm"] = np.mean(self.norms, axis=0).tolist()
        total, tokens = torch.stack(self.indexer_kl).sum(0).tolist() if self.indexer_kl else (0.0, 1.0)
        return found | {"indexer_kl": total / tokens}
