"""A policy from nothing: supervised training on generated demonstrations of every domain and of judging."""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import DeepseekV32ForCausalLM

from trimtab.environments.base import Message
from trimtab.grpo.config import ColdStart, Config
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.runs.lock import locked
from trimtab.grpo.stages.beginning import Demonstrate, sources, texts_of
from trimtab.grpo.stages.config import Supervised
from trimtab.grpo.stages.data import Tokens
from trimtab.grpo.stages.shapes import quickstart_policy
from trimtab.grpo.stages.supervised import SupervisedTrainer
from trimtab.grpo.stages.tokenizer import train_tokenizer
from trimtab.rollout.formats.chat import Chat, render
from trimtab.rollout.formats.dsml import BOS, EOS, MARKUP, SPECIAL_TOKENS

TOKENIZER_EXAMPLES = 3000
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the cold start: what attention sees, and whether the indexer learns from it."""

    name: str
    dense: bool
    learns_indexer: bool


DENSE = Stage("dense", dense=True, learns_indexer=False)
WARM_UP = Stage("indexer warm-up", dense=True, learns_indexer=True)
SPARSE = Stage("sparse", dense=False, learns_indexer=True)


def cold_start(config: Config, console: Console) -> Path:
    """The checkpoint that a run without a model starts from, trained once and kept under runs/cold-start-*.

    The folder's name is a hash of the settings and of the sources that make the examples, so a change of either
    trains anew.
    """
    folder = Path("runs") / f"cold-start-{_fingerprint(config)}"
    if (folder / "config.json").is_file():
        console.print(f"cold start: using {folder}")
        return folder
    with locked(folder.with_name(folder.name + ".lock"), f"the cold start {folder}"):
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        train(config, partial, console)
        partial.rename(folder)
    console.print(f"cold start: kept in {folder}")
    return folder


def train(config: Config, out: Path, console: Console) -> None:
    """Train from random weights and write a checkpoint with its tokenizer to `out`.

    First attention is dense; then the indexer learns to find what it looks at (warm-up); then attention follows the
    indexer, which goes on learning over what it selects [DeepSeek-V3.2, section 2.1]. Other than there, the model
    goes on learning in the warm-up: it is too short to be spent on the indexer alone.
    """
    settings = config.cold_start
    found = sources(config.domains, settings.judge_demonstrations)
    tokenizer = train_tokenizer(
        texts_of(_shown(found, settings)),
        vocab_size=settings.vocab_size,
        special=SPECIAL_TOKENS,
        markup=MARKUP,
        bos=BOS,
        eos=EOS,
    )
    chat = Chat(tokenizer)
    torch.manual_seed(settings.seed)
    model = DeepseekV32ForCausalLM(quickstart_policy(len(tokenizer), chat.bos_id, chat.eos_id))
    policy = Policy(model).to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    console.print(
        f"cold start: {parameters / 1e6:.1f} M parameters, vocabulary {len(tokenizer)}, {settings.steps} steps"
    )
    _optimise(policy, _batches(found, settings, chat), settings, console)
    policy.save(out)
    tokenizer.save_pretrained(out)


def _shown(found: Mapping[str, tuple[Demonstrate, bool, float]], settings: ColdStart) -> Iterator[tuple[Message, ...]]:
    """What the tokenizer is learnt from."""
    rng = random.Random(f"tokenizer{settings.seed}")
    for _ in range(TOKENIZER_EXAMPLES // len(found)):
        for demonstrate, _, _ in found.values():
            yield demonstrate(rng)


def _batches(
    found: Mapping[str, tuple[Demonstrate, bool, float]], settings: ColdStart, chat: Chat
) -> Iterator[list[Tokens]]:
    """Endless batches of about tokens_per_step tokens."""
    rng = random.Random(f"cold start{settings.seed}")
    names = list(found)
    shares = [found[name][2] for name in names]
    while True:
        batch: list[Tokens] = []
        while sum(len(one.ids_N) for one in batch) < settings.tokens_per_step:
            demonstrate, thinking, _ = found[rng.choices(names, shares)[0]]
            batch += [Tokens(*sequence) for sequence in render(chat, demonstrate(rng), thinking=thinking)]
        yield batch


def _optimise(policy: Policy, batches: Iterator[list[Tokens]], settings: ColdStart, console: Console) -> None:
    """A step a batch; the optimiser's state goes on from part to part."""
    supervised = Supervised(
        optimizer="muon",
        lr=settings.lr,
        weight_decay=WEIGHT_DECAY,
        prompt_weight=settings.prompt_weight,
        tokens_per_microbatch=2 * settings.tokens_per_step,
        precision="fp32",
    )
    trainer = SupervisedTrainer(supervised, policy, device=policy.head_weight.device)
    started = time.perf_counter()
    tokens = 0
    for step in range(settings.steps):
        stage = _stage(step / settings.steps, settings)
        trainer.config = replace(supervised, dense_attention=stage.dense, indexer_kl=float(stage.learns_indexer))
        trainer.set_lr(settings.lr * _schedule(step, settings.steps))
        batch = next(batches)
        found = trainer.train_on(batch, step)
        tokens += sum(len(one.ids_N) for one in batch)
        if (step + 1) % max(settings.steps // 20, 1) == 0:
            speed = tokens / (time.perf_counter() - started)
            console.print(
                f"cold start: step {step + 1}/{settings.steps} ({stage.name})  loss {found['loss']:.3f}  "
                f"indexer KL {found.get('indexer_kl', 0.0):.3f}  {speed:,.0f} tok/s",
                highlight=False,
            )


def _stage(progress: float, settings: ColdStart) -> Stage:
    if progress < settings.dense_share:
        return DENSE
    return WARM_UP if progress < settings.dense_share + settings.warmup_share else SPARSE


def _schedule(step: int, steps: int) -> float:
    warmup = max(round(0.05 * steps), 1)
    return min((step + 1) / warmup, 1.0) * (1.0 - 0.9 * step / steps)


def _fingerprint(config: Config) -> str:
    package = Path(__file__).parent.parent.parent
    formats = [package / "rollout" / "formats" / f"{name}.py" for name in ("chat", "dsml", "strict_json")]
    own = sorted(
        {Path(file) for domain in config.domains.values() if (file := domain.task.rpartition(":")[0]).endswith(".py")}
    )
    stages = [Path(__file__).parent / f"{name}.py" for name in ("cold_start", "beginning", "shapes", "supervised")]
    sources = [*stages, *sorted((package / "environments").rglob("*.py")), *formats, *own]
    tasks = {name: (domain.task, domain.thinking, domain.demonstrations) for name, domain in config.domains.items()}
    settings = json.dumps([asdict(config.cold_start), tasks], sort_keys=True).encode()
    return hashlib.sha256(settings + b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]
