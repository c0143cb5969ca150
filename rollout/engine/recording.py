"""Records the kept set of every sampled token where vLLM itself cannot: its CPU worker.

On a GPU, vLLM's return_sampling_mask does the same.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import SamplingMaskLists
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.cpu_worker import CPUWorker

from trimtab.rollout.engine.worker import reporting

REPORTING: Any = reporting(CPUWorker)


def truncate(logit_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keep the top_k best ids, and of these the fewest whose probability reaches top_p.

    An id stays while the probability of all better ones is below top_p, so the best always stays. Works on the
    max(top_k) best ids only: sorting a vocabulary costs more than a small model's whole step.

    Returns:
        Log-probabilities over the kept ids, [B, max(top_k)] in descending order, -inf where dropped; and the ids.
    """
    logit_BK, id_BK = logit_BV.topk(min(int(top_k_B.max()), logit_BV.shape[-1]), dim=-1)
    rank_K = torch.arange(logit_BK.shape[-1], device=logit_BK.device)
    logit_BK = logit_BK.masked_fill(rank_K >= top_k_B[:, None], float("-inf"))
    if top_p_B is not None:
        probability_BK = logit_BK.softmax(-1)
        better_BK = probability_BK.cumsum(-1) - probability_BK
        logit_BK = logit_BK.masked_fill((better_BK >= top_p_B[:, None]) & (rank_K > 0), float("-inf"))
    return logit_BK.log_softmax(-1), id_BK


def draw(logp_BK: Tensor, generators: dict[int, torch.Generator]) -> Tensor:
    """Sample a column of each row by an exponential race, with a row's own generator where it has one: [B, 1]."""
    noise_BK = torch.empty_like(logp_BK).exponential_()
    for row, generator in generators.items():
        noise_BK[row].exponential_(generator=generator)
    return (logp_BK.exp() / noise_BK).argmax(-1, keepdim=True)


class Rewindable(torch.Generator):
    """Stands in for a request's generator, whose last draw it can undo.

    vLLM undoes the draw of an unfinished prompt by moving the offset of a CUDA generator; those of a CPU have none.
    """

    source: torch.Generator
    before: Tensor

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        self.source.set_state(self.before)
        return self


def rewindable(generators: dict[int, torch.Generator]) -> dict[int, torch.Generator]:
    """Replace the generators of a batch, in place, by rewindable ones; return those to draw from."""
    sources = {}
    for row, generator in generators.items():
        if not isinstance(generator, Rewindable):
            source, generator = generator, Rewindable()
            generator.source = source
            generators[row] = generator
        generator.before = generator.source.get_state()
        sources[row] = generator.source
    return sources


class RecordingSampler(Sampler):
    """vLLM's sampler with truncation and sampling of its own, which remembers what it kept."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.kept: SamplingMaskLists | None = None

    def sample(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        meta = sampling_metadata
        if not meta.all_random or meta.temperature is None:
            raise ValueError("a greedy row has no kept set; sample with a temperature")
        logit_BV = logits / meta.temperature[:, None]
        top_k_B = torch.full_like(meta.temperature, logits.shape[-1]) if meta.top_k is None else meta.top_k
        logp_BK, id_BK = truncate(logit_BV, top_k_B, meta.top_p)
        kept_BK = logp_BK > float("-inf")
        offsets = np.zeros(len(logits) + 1, np.int64)
        np.cumsum(kept_BK.sum(-1).numpy(), out=offsets[1:])
        self.kept = SamplingMaskLists(id_BK[kept_BK].to(torch.int32).numpy(), offsets)
        sampled_B1 = draw(logp_BK, rewindable(meta.generators))
        logp_BV = torch.full_like(logits, float("-inf")).scatter_(1, id_BK, logp_BK)
        return id_BK.gather(1, sampled_B1)[:, 0], logp_BV


class RecordingCPUWorker(REPORTING):
    """A CPU worker whose outputs carry the kept sets."""

    def init_device(self) -> None:
        super().init_device()
        runner: Any = self.model_runner
        if (mode := self.model_config.logprobs_mode) != "processed_logprobs":
            raise ValueError(f"log-probabilities must be those of the kept set, processed_logprobs, got {mode}")
        sampler = runner.sampler = RecordingSampler(logprobs_mode=runner.sampler.logprobs_mode)
        sample_tokens = runner.sample_tokens

        def sample_and_record(grammar_output: Any) -> Any:
            sampler.kept = None
            output = sample_tokens(grammar_output)
            if sampler.kept is not None:
                output.sampling_masks = sampler.kept
            return output

        runner.sample_tokens = sample_and_record


class RecordingScheduler(Scheduler):
    """Hands the kept sets of RecordingCPUWorker to their requests."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.return_sampling_mask = True
