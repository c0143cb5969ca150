"""Supervised stages: pre-training, the indexer's warm-up, sparse training and SFT are one loop over a Learner.

Shape suffixes: N = tokens of a pack, S = tokens that the loss asks for, D = hidden width.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trimtab.grpo.config import read_settings
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.cost.flops import Work
from trimtab.grpo.cost.meter import Meter
from trimtab.grpo.cost.shape import Shape, shape_of
from trimtab.grpo.policy.checkpoint import check_checkpoint, check_settings
from trimtab.grpo.policy.families import architecture
from trimtab.grpo.policy.learner import Learner, Optimisation
from trimtab.grpo.policy.policy import Policy, PolicyOutput, load_policy, random_policy
from trimtab.grpo.policy.selection import measuring_selection
from trimtab.grpo.policy.shard import compute_dtype, without_gradient
from trimtab.grpo.runs.changes import changes
from trimtab.grpo.runs.checkpoints import step_of
from trimtab.grpo.runs.folder import RunFolder, remedy
from trimtab.grpo.runs.record import record_start
from trimtab.grpo.runs.saving import Saving
from trimtab.grpo.runs.signals import Stop, until_stopped
from trimtab.grpo.schedule import lr_factor
from trimtab.grpo.setup.models import locate
from trimtab.grpo.stages.config import Supervised
from trimtab.grpo.stages.data import Corpus, Tokens, batches, packs, read_conversations, read_texts
from trimtab.grpo.stages.memory import check_memory
from trimtab.kernels import reference
from trimtab.rollout.checkpoint import read_config

LONGEST = 8192
"""Tokens of a sequence that nobody asked for."""
LINES = 20
"""Of progress in a whole stage."""
FALL = 0.01
"""What a loss must fall by from window to window not to lie on a plateau."""
BETAS = (0.9, 0.95)
"""AdamW's in supervised training [DeepSeek-V3, section 4.2]."""


def prepare(config: Supervised, path: Path, *, resume: bool) -> "SupervisedRun":
    """Check everything that can be checked before the first minute is spent, and read the data.

    Raises:
        ValueError: a model, file, size or run folder that is missing or unfit; in one sentence, with the remedy.
        FileNotFoundError: no such file of data.
    """
    changed: Mapping[str, Any] = {}
    checkpoint: Path | None = None
    if resume:
        folder = RunFolder.open(path)
        changed = changes(read_settings(Supervised, folder.config), config)
        with folder.lock():
            checkpoint = folder.checkpoints.latest()
    elif path.exists():
        raise ValueError(f"{path} exists already; continue it with `trimtab train {path} --resume`")
    config = _complete(config)
    corpus = read(config)
    if config.steps is None:
        tokens = sum(len(one.ids_N) for one in corpus.train)
        config = replace(config, steps=max(math.ceil(config.epochs * tokens / config.tokens_per_step), 1))
    _check_selection(config, corpus)
    return SupervisedRun(config, path, corpus, resume, checkpoint, changed)


def _complete(config: Supervised) -> Supervised:
    """The settings with what they leave open, if the model can be trained so."""
    if not config.model:
        raise ValueError("model is empty: give a checkpoint folder, a .gguf file or a name on the model hub")
    if not config.data:
        raise ValueError("data is empty: give .jsonl or .parquet files")
    model = locate(config.model)
    name = check_settings(model)[0] if config.random_weights else check_checkpoint(model)
    sparse = architecture(name).sparse
    if not sparse and (config.learns == "indexer" or config.dense_attention):
        raise ValueError(f"{model} is a {name} and has no indexer; `trimtab convert {model} FOLDER` gives it one")
    positions = read_config(model).get("max_position_embeddings")
    max_len = config.max_len or min(positions or LONGEST, LONGEST)
    if positions and max_len > positions:
        raise ValueError(f"max_len is {max_len}, but the model has {positions} positions; lower it")
    precision = config.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    config = replace(config, model=str(model), max_len=max_len, precision=precision)
    if torch.cuda.is_available():
        check_memory(config, shape_of(read_config(model)), torch.cuda.mem_get_info()[0])
    return config


def _check_selection(config: Supervised, corpus: Corpus) -> None:
    """Refuse to teach an indexer on sequences of which it would leave nothing out."""
    topk = read_config(config.model).get("index_topk")
    longest = max(len(one.ids_N) for one in corpus.train)
    if topk and topk >= longest and (config.learns == "indexer" or config.indexer_kl) and not config.random_weights:
        raise ValueError(
            f"index_topk is {topk} and the longest sequence has {longest} tokens (max_len {config.max_len}): nothing "
            "is ever left out; take longer texts, a larger max_len, or a smaller index_topk (trimtab convert "
            "--index-topk)"
        )


def read(config: Supervised) -> Corpus:
    """The data of a stage, as sequences of its model.

    Raises:
        ValueError: a file that cannot be read, nothing left to train on.
        FileNotFoundError: no such file.
    """
    assert config.max_len
    options: dict[str, Any] = {
        "model": config.model,
        "field": config.text_field,
        "max_len": config.max_len,
        "held_out": config.held_out,
    }
    if config.form == "text":
        return read_texts(config.data, **options)
    return read_conversations(config.data, **options, thinking=config.thinking)


class SupervisedTrainer(Learner):
    """A policy that learns the next tokens of sequences, and an indexer that learns where attention looks."""

    def __init__(self, config: Supervised, policy: Policy, *, device: torch.device, clock: Clock | None = None):
        """The policy is given in fp32. What is frozen keeps its weights to the bit: it is rounded for computing alone.

        Raises:
            ValueError: nothing is to learn.
        """
        self.config = config
        learns_indexer = policy.sparse and config.indexer_kl > 0
        indexer = {id(weight) for weight in policy.indexer_parameters()}
        for weight in policy.parameters():
            weight.requires_grad_(learns_indexer if id(weight) in indexer else config.learns == "all")
        optimisation = Optimisation(
            lr=config.lr,
            optimizer=config.optimizer,
            betas=BETAS,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            offload=config.offload,
        )
        dtype = compute_dtype(config.precision, device)
        super().__init__(policy, optimisation, device=device, dtype=dtype, clock=clock)

    def train_on(self, batch: Sequence[Tokens], step: int) -> dict[str, float]:
        """One optimiser step over a batch, however it is cut into packs.

            L = -1/W sum_t w_t log pi(x_t | x_<t) + lambda/N sum_t KL(p_t || softmax(I_t))

        w_t is 1 where the loss asks for token t and prompt_weight elsewhere, W their sum; N counts all tokens. The
        second term is the indexer's [DeepSeek-V3.2-Exp, eq. 3 and 4]: over all earlier keys where attention is dense,
        else over the selected ones.

        Returns:
            Metrics: loss and indexer_kl without lambda, norms of both gradients.

        Raises:
            Diverged: a gradient is not finite.
        """
        config = self.config
        weight = sum(float(self._weights([one]).sum()) for one in batch)
        tokens = sum(len(one.ids_N) for one in batch)
        total, kl_total = [], []
        with self.clock.phase("forward and backward"):
            for pack in packs(batch, config.tokens_per_microbatch):
                loss, kl = self._losses(pack, dense=config.dense_attention)
                terms = [] if loss is None else [loss / weight]
                terms += [] if kl is None else [config.indexer_kl * kl / tokens]
                torch.stack(terms).sum().backward()
                total += [] if loss is None else [loss.detach()]
                kl_total += [] if kl is None else [kl.detach()]
            norm, indexer_norm = self.clip(step)
        self.optimise()
        found = {"grad_norm": norm, "indexer_grad_norm": indexer_norm}
        if total:
            found["loss"] = float(torch.stack(total).sum()) / weight
        if kl_total:
            found["indexer_kl"] = float(torch.stack(kl_total).sum()) / tokens
        return found

    def _losses(self, pack: Sequence[Tokens], *, dense: bool) -> tuple[Tensor | None, Tensor | None]:
        """Sums over a pack: of the weighted cross-entropy, if the model learns, and of the indexer's KL, if it does."""
        out, ids_N = self._read(pack, dense=dense, with_kl=self.learns_indexer and self.config.indexer_kl > 0)
        kl = None if out.indexer_kl_N is None else out.indexer_kl_N.sum()
        return self._cross_entropy(out, ids_N, pack) if self.config.learns == "all" else None, kl

    def _read(self, pack: Sequence[Tokens], *, dense: bool, with_kl: bool) -> tuple[PolicyOutput, Tensor]:
        lengths = [len(one.ids_N) for one in pack]
        ids_N = torch.from_numpy(np.concatenate([one.ids_N for one in pack])).long().to(self.device)
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)]).to(self.device)
        out = self.policy(ids_N, cu_seqlens, lengths=lengths, dense_attention=dense, with_indexer_kl=with_kl)
        return out, ids_N

    def _cross_entropy(self, out: PolicyOutput, ids_N: Tensor, pack: Sequence[Tokens]) -> Tensor:
        """Weighted sum over a pack, in nats."""
        weight_N = self._weights(pack)
        asked_S = np.flatnonzero(weight_N)
        place_S = torch.from_numpy(asked_S).to(self.device)
        weight_S = torch.from_numpy(weight_N[asked_S]).to(self.device)
        hidden_SD = out.hidden_ND.index_select(0, place_S - 1)
        return -(self._logp(hidden_SD, ids_N.index_select(0, place_S)) * weight_S).sum()

    def _weights(self, pack: Sequence[Tokens]) -> np.ndarray:
        """Of each token in the loss, float32 [N]; 0 for the first of a sequence, which nothing predicts."""
        found = []
        for one in pack:
            weight_N = np.where(one.asked_N, np.float32(1.0), np.float32(self.config.prompt_weight))
            weight_N[0] = 0.0
            found.append(weight_N)
        return np.concatenate(found)

    def _logp(self, hidden_SD: Tensor, token_S: Tensor) -> Tensor:
        if hidden_SD.is_cuda:
            from trimtab.kernels.lm_head import full_logp_entropy

            return full_logp_entropy(hidden_SD, self.policy.head_weight, token_S, 1.0)[0]
        return reference.full_logp(hidden_SD, self.policy.head_weight, token_S, 1.0)

    def measure(self, sequences: Sequence[Tokens]) -> dict[str, Any]:
        """What the policy is worth on sequences, without learning from them; tokens count as in the loss.

        Returns:
            loss, in nats a token; of a policy with an indexer also loss_dense, with attention to all keys,
            indexer_kl, over all keys, and selected_mass, the share of dense attention that falls on what the
            indexer selects, by layer.
        """
        with self.awake(), without_gradient(self.policy):
            found: dict[str, Any] = {"loss": self._mean_loss(sequences, dense=False)[0]}
            if self.policy.sparse:
                with measuring_selection(self.policy) as mass:
                    found["loss_dense"], found["indexer_kl"] = self._mean_loss(sequences, dense=True)
                found["selected_mass"] = mass.by_layer()
        return found

    def _mean_loss(self, sequences: Sequence[Tokens], *, dense: bool) -> tuple[float, float]:
        """The cross-entropy, a token, and with dense attention the indexer's KL, a query."""
        loss = kl = weight = tokens = 0.0
        for pack in packs(sequences, self.config.tokens_per_microbatch):
            out, ids_N = self._read(pack, dense=dense, with_kl=dense)
            loss += float(self._cross_entropy(out, ids_N, pack))
            kl += 0.0 if out.indexer_kl_N is None else float(out.indexer_kl_N.sum())
            weight += float(self._weights(pack).sum())
            tokens += len(ids_N)
        return loss / weight, kl / tokens


@dataclass(frozen=True, slots=True)
class SupervisedRun:
    """A checked stage, ready to start."""

    config: Supervised
    path: Path
    corpus: Corpus
    resume: bool
    checkpoint: Path | None
    changed: Mapping[str, Any]

    def train(self) -> int:
        """Run to the last step, to a plateau, or to the step during which a signal comes. Returns the exit code.

        Raises:
            Exception: Diverged, a full disk: the last whole step is saved.
        """
        return until_stopped(self._train, lambda: remedy(self.path))

    def _train(self, console: Console, stop: Stop) -> int:
        config, first = self.config, step_of(self.checkpoint) if self.checkpoint else 0
        assert config.steps
        with ExitStack() as stack:
            folder = RunFolder(self.path) if self.resume else RunFolder.create(self.path, config)
            stack.enter_context(folder.lock())
            console.print(f"run: {folder.path}")
            console.print(f"data: {self.corpus.statement()}", soft_wrap=True, highlight=False)
            folder.go_on(config, first)
            record_start(folder.path, first, self.changed)
            trainer = load_trainer(config, self.checkpoint)
            meter = Meter(_shape(config), trainer.clock, learns=config.learns, learn_indexer=trainer.learns_indexer)
            if first == 0:
                folder.save_held_out(before=trainer.measure(self.corpus.held_out))
            saving = Saving(folder, trainer, first, model=Path(config.model))
            data = batches(self.corpus.train, tokens=config.tokens_per_step, seed=config.seed, start=first)
            name = "indexer_kl" if config.learns == "indexer" else "loss"
            values = [row[name] for row in folder.metrics()] if config.plateau else []
            with saving.on_failure():
                for step in range(first, config.steps):
                    if config.plateau and on_plateau(values, config.plateau):
                        fall = f"it fell by less than {FALL:.0%} in {config.plateau} steps"
                        console.print(f"{name} has come to rest: {fall}", highlight=False)
                        break
                    with stop.after_the_step():
                        row = self._step(trainer, meter, next(data), step)
                        saving.trained(step + 1)
                        folder.log(row)
                        values.append(row[name])
                        if (step + 1) % max(config.steps // LINES, 1) == 0 or step + 1 == config.steps:
                            console.print(_line(row, config.steps), highlight=False, soft_wrap=True)
                        with trainer.clock.phase("saving"):
                            saving.after_step(due=(step + 1) % config.save_every == 0 or stop.asked())
                    if stop.asked():
                        console.print(f"stopped after step {step + 1}; {remedy(folder.path)}")
                        return stop.exit_code
            saving.save()
            folder.save_held_out(after=trainer.measure(self.corpus.held_out))
            saved, owing = saving.save(), folder.owing()
            if not saved or owing:
                wrong = f"could not be written ({owing})" if saved else "has no last checkpoint"
                raise OSError(f"the stage is over, but its folder {wrong}; make room")
        report(folder, console)
        return 0

    def _step(self, trainer: SupervisedTrainer, meter: Meter, batch: Sequence[Tokens], step: int) -> dict[str, Any]:
        config = self.config
        assert config.steps
        meter.start()
        factor = lr_factor(step, steps=config.steps, warmup_steps=_warmup(config), end_share=config.lr_end_share)
        trainer.set_lr(config.lr * factor)
        found = trainer.train_on(batch, step)
        lengths = [len(one.ids_N) for one in batch]
        asked = sum(int(one.asked_N.sum()) for one in batch)
        work = Work(lengths=lengths, sampled=sum(lengths) if config.prompt_weight else asked)
        counts = {"tokens": sum(lengths), "asked_tokens": asked, "sequences": len(batch)}
        return {"step": step, **found, "lr": config.lr * factor, **counts, **meter.metrics(work)}


def on_plateau(values: Sequence[float], window: int) -> bool:
    """Whether the mean of the last so many values is less than FALL below that of as many before."""
    if len(values) < 2 * window:
        return False
    before, after = np.mean(values[-2 * window : -window]), np.mean(values[-window:])
    return bool(after > before - FALL * abs(before))


def load_trainer(config: Supervised, checkpoint: Path | None) -> SupervisedTrainer:
    """The trainer, as it was when the checkpoint was written; None: as it starts."""
    recompute = config.checkpoint_activations
    if checkpoint is None and config.random_weights:
        policy = random_policy(config.model, seed=config.seed, checkpointing=recompute)
    else:
        policy = load_policy(checkpoint or config.model, checkpointing=recompute)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = SupervisedTrainer(config, policy, device=device)
    if checkpoint is not None:
        trainer.load_optimizer(checkpoint)
    return trainer


def report(folder: RunFolder, console: Console) -> None:
    """The end of a stage: what was held out before and after, and where things are."""
    table = Table(title="held out", title_justify="left")
    for header in ("", "before", "after"):
        table.add_column(header, justify="left" if not header else "right")
    before, after = (folder.held_out()[name] for name in ("before", "after"))
    for name in after:
        table.add_row(name, *(_number(scores.get(name)) for scores in (before, after)))
    console.print(table)
    console.print(f"metrics      {folder.path / 'metrics.jsonl'}")
    console.print(f"checkpoint   {folder.checkpoints.all()[-1]}")


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{one:.2f}" for one in value)
    return f"{value:.4f}"


def _line(row: Mapping[str, Any], steps: int) -> str:
    parts = [f"step {row['step'] + 1}/{steps}"]
    parts += [f"loss {row['loss']:.3f}"] if "loss" in row else []
    parts += [f"indexer KL {row['indexer_kl']:.3f}"] if "indexer_kl" in row else []
    parts += [f"lr {row['lr']:.1e}", f"{row['tokens'] / row['seconds']:,.0f} tok/s"]
    parts += [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    return "  ".join(parts)


def _warmup(config: Supervised) -> int:
    assert config.steps
    return config.steps // 20 if config.warmup_steps is None else config.warmup_steps


def _shape(config: Supervised) -> Shape:
    """What the meter counts by; with dense attention every layer attends to all keys."""
    shape = shape_of(read_config(config.model))
    if not config.dense_attention:
        return shape
    return replace(shape, layers=tuple(replace(layer, topk=None) for layer in shape.layers))
