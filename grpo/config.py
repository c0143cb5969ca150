"""A run as one tree of frozen dataclasses. Derived values are properties, never fields. Imports no torch."""

import hashlib
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from trimtab.rewards.types import GroupReward, ProcessReward
from trimtab.rollout.context import ContextPolicy
from trimtab.rollout.types import Sampling

_FILE_MODULE = "trimtab_file_"
"""Begins the names of modules that were loaded from files."""


def load(path: str) -> Any:
    """What an import path leads to: module:name, or path/to/file.py:name. A file is run once.

    Raises:
        ValueError: it leads nowhere.
    """
    module, _, name = path.rpartition(":")
    try:
        found = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        return getattr(found, name)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"an import path is module:name or path/to/file.py:name, and both must exist; got {path!r} ({error})"
        ) from error


def _load_file(file: Path) -> ModuleType:
    file = file.resolve()
    key = f"{_FILE_MODULE}{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def loaded_files() -> list[Path]:
    """The files that `load` has run in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith(_FILE_MODULE)]
    return sorted(Path(module.__file__) for module in modules if module.__file__)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def resolved(value: int | None) -> int:
    """A setting that grpo/setup/resolve.py has filled in."""
    assert value is not None, "a configuration plays and trains once it is resolved"
    return value


def percentile(text: str) -> float:
    """What p99 means.

    Raises:
        ValueError: it is no percentile.
    """
    try:
        value = float(text.removeprefix("p"))
    except ValueError:
        value = math.nan
    if not (text.startswith("p") and 0 <= value <= 100):
        raise ValueError(f"delta is a number, None, or a percentile such as p99, got {text!r}")
    return value


class Settings:
    """What something is run with: a dataclass that a file holds."""

    __slots__ = ()

    def to_json(self: Any) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """The GRPO objective of one domain."""

    beta: float = 0.001
    """Strength of the unbiased KL to the reference policy; 0 leaves it out."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """... and above at 1 + clip_high."""
    delta: float | str | None = 0.1
    """A failed trajectory whose mean log(pi_old / pi) exceeds this leaves the surrogate; None keeps all. As p99, p95 or
    the like: that percentile of the domain's trajectories in the rollout batch before."""
    surrogate: bool = True
    """The clipped surrogate of the rewards trains. False: the KL alone does, and rewards are only logged; with teachers
    and kl = full that is on-policy distillation."""
    drop_equal_groups: bool = False
    """Leave groups out whose rewards are all equal, with their KL term and their part of the divisor: the fewer have
    signal, the more each counts. Otherwise their KL stays [DeepSeek-V3.2, eq. 5], and every group counts the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be 0 or more and finite (0 trains without a reference), got {self.beta}")
        if not self.surrogate and not self.beta:
            raise ValueError("surrogate is false and beta is 0: nothing would train; set beta")
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low must lie in (0, 1], got {self.clip_low}")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high must be above 0, got {self.clip_high}")
        if isinstance(self.delta, str):
            percentile(self.delta)
        elif self.delta is not None and not self.delta >= 0:
            raise ValueError(f"delta must be 0 or more (or None to keep every trajectory), got {self.delta}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One kind of task in the mixture."""

    task: str
    """Import path of a Task class, as module:Name or path/to/file.py:Name. Its constructor may name services: `judge`
    (rewards.judging.rubric.Judge) and `grade` (rewards.judging.rubric.Grader)."""
    score: str = "outcome"
    """The reward part that held-out scores report."""
    teacher: str = ""
    """Checkpoint that this domain's KL is taken to; empty: the model that the run starts from."""
    prompts: int = 8
    """Groups a step; 0: held out alone, measured before and after and never trained on."""
    demonstrations: float = 1.0
    """Examples in the cold start, relative to the other domains'."""
    weights: dict[str, float] = field(default_factory=lambda: {"outcome": 1.0})
    """Weight of each named reward part; parts that are not named are logged but do not train."""
    group_rewards: dict[str, str] = field(default_factory=dict)
    """Import paths of the parts that compare the episodes of a group (rewards/types.py: GroupReward), by name."""
    process_rewards: dict[str, str] = field(default_factory=dict)
    """Import paths of the parts that score an episode's segments (rewards/types.py: ProcessReward), by name."""
    loss: LossSettings = field(default_factory=LossSettings)
    length: Literal["overlong", "relative", "kimi"] = "overlong"
    """How the reward part `length` comes from the sampled tokens of an episode: beyond a limit, or relative to its
    group, where an episode is correct if its score part is at least 1 (rewards/length.py)."""
    length_soft: int | None = None
    """Sampled tokens above which an overlong episode falls below 0 (None: three quarters of length_hard) ..."""
    length_hard: int | None = None
    """... and at which it reaches -1 (None: what an episode may sample: the turn's limit, or the window)."""
    thinking: bool = True
    """The policy reasons before it answers."""
    context: ContextPolicy = field(default_factory=ContextPolicy)
    max_turns: int = 16
    """Assistant messages of an episode, at most."""
    floor: float | None = None
    """What an episode earns at most that is cut off, malformed or has too many turns; None: as much as the worst answer
    of its group."""
    grade_check: bool = True
    """Before training on a file, its own answers must earn full marks and rubbish none, up to the share max_lost
    (trimtab grade-check). False: answers of the file are not meant to earn full marks."""
    max_lost: float = 0.5
    """Share of the groups that may be lost (a reward, a tool, a judge that fails), over the latest steps with 8 groups
    together; above it the run stops and says why."""
    open_environments: int = 64
    """Environments open at the same time; groups of a batch wait for each other beyond it. One of the interpreter's
    takes about 60 MiB."""
    episode_seconds: float = 1800.0
    """From an episode's first turn to its reward; one that takes longer is lost."""
    group_seconds: float = 3600.0
    """The same of a group of episodes, its opening included."""

    def __post_init__(self) -> None:
        if self.prompts < 0:
            raise ValueError(f"prompts must be 0 (held out alone) or more, got {self.prompts}")
        for name in ("max_turns", "open_environments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("episode_seconds", "group_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not any(self.weights.values()):
            raise ValueError(f"weights must give at least one reward part a weight other than 0, got {self.weights}")
        if wrong := {part: weight for part, weight in self.weights.items() if not math.isfinite(weight)}:
            raise ValueError(f"weights must be finite, got {wrong}")
        if not 0 <= self.max_lost <= 1:
            raise ValueError(f"max_lost is a share of groups in [0, 1], got {self.max_lost}")
        if self.floor is not None and not math.isfinite(self.floor):
            raise ValueError(f"floor must be finite (or None: as the worst answer of the group), got {self.floor}")
        soft, hard = self.length_soft, self.length_hard
        if soft is not None and not 0 < soft < (math.inf if hard is None else hard):
            raise ValueError(f"length_soft must lie in (0, length_hard), got {soft} of {hard}")
        if hard is not None and hard < 1:
            raise ValueError(f"length_hard must be at least 1, got {hard}")
        if "length" in {*self.group_rewards, *self.process_rewards}:
            raise ValueError("the reward part 'length' is the length penalty's; give yours another name")
        if both := self.group_rewards.keys() & self.process_rewards.keys():
            raise ValueError(f"the reward part {min(both)!r} is a group's and a segment's; rename one of them")

    def load_task(self, **services: Any) -> Any:
        """Make the Task, handing it those services that its constructor names.

        Raises:
            ValueError: the import path leads nowhere.
        """
        return load(self.task)(**{key: value for key, value in services.items() if key in self.services})

    @property
    def services(self) -> frozenset[str]:
        """What the constructor of the Task names.

        Raises:
            ValueError: the import path leads nowhere.
        """
        return frozenset(getattr(load(self.task).__init__, "__annotations__", {}))

    def load_group_rewards(self) -> dict[str, GroupReward]:
        """The group rewards by part.

        Raises:
            ValueError: an import path leads nowhere.
        """
        return {part: load(path) for part, path in self.group_rewards.items()}

    def load_process_rewards(self) -> dict[str, ProcessReward]:
        """The process rewards by part.

        Raises:
            ValueError: an import path leads nowhere.
        """
        return {part: load(path) for part, path in self.process_rewards.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStart:
    """Supervised training from random weights on generated demonstrations; used when no model is given."""

    steps: int = 1200
    """Optimiser steps, at least 2."""
    dense_share: float = 0.5
    """Share of the steps with dense attention and no indexer, which come first."""
    warmup_share: float = 0.15
    """Share of the steps in which attention is still dense and the indexer learns from all keys; the rest is sparse."""
    tokens_per_step: int = 1024
    prompt_weight: float = 0.5
    """Weight in the loss of a token that the policy would not sample: learning to copy starts there."""
    lr: float = 3e-3
    """Peak learning rate; linear warm-up over 5 % of the steps, then linear decay to a tenth."""
    vocab_size: int = 1024
    judge_demonstrations: float = 1.0
    """Examples of judging, relative to the domains' demonstrations."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"cold_start.steps must be at least 2, got {self.steps}")
        if not (self.dense_share >= 0 and self.warmup_share >= 0 and self.dense_share + self.warmup_share <= 1):
            shares = f"{self.dense_share} and {self.warmup_share}"
            raise ValueError(f"dense_share and warmup_share must be 0 or more and at most 1 together, got {shares}")
        if self.vocab_size < 512:
            raise ValueError(f"vocab_size must be at least 512 (256 bytes, markup and words), got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """The engines that sample."""

    actors: int = 1
    """Ray actors, each with its own vLLM engine."""
    gpus_per_actor: float | None = None
    """Share of a GPU each engine reserves; None: an equal share, beside the trainer; none on a CPU."""
    max_len: int | None = None
    """Longest context in tokens; None: as many as the model has positions, at most 8192."""
    kv_cache_mib: int | None = None
    """Memory of one engine's key-value cache; None: what its sequences can use, as far as the ledger leaves room."""
    max_num_seqs: int = 256
    """Sequences one engine decodes together."""
    graphs: bool | None = None
    """Decode in CUDA graphs; None: on a GPU."""
    sleep: bool | None = None
    """Engines leave the GPU while the policy trains; None: where the ledger says that both do not fit."""
    requests_per_engine: int = 2048
    """Requests that one engine has at the same time; others wait."""
    step_seconds: float = 600.0
    """An engine with requests that does not move for so long is replaced."""
    max_restarts: int = 8
    """Engines that are replaced in a row, without a request that is answered or given up, before the run ends."""
    deterministic: bool = False
    """One sequence at a time and no prefix cache: what is sampled does not depend on the order in which requests come.
    On a CPU two runs are then equal to the bit; the price is the batch."""

    def __post_init__(self) -> None:
        if not self.step_seconds > 0:
            raise ValueError(f"rollout.step_seconds must be above 0, got {self.step_seconds}")
        for name in ("actors", "max_len", "kv_cache_mib", "max_num_seqs", "requests_per_engine", "max_restarts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Low-rank adapters in place of all weights [LoRA, arXiv 2106.09685]."""

    rank: int = 0
    """Rank of the update; 0 trains all weights."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get adapters, such as q_proj; all-linear: every one but the head."""
    merge: bool = False
    """Checkpoints also hold the whole model with the adapters in it, in a folder merged."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (off) or more, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be above 0, got {self.alpha}")
        if not self.targets:
            raise ValueError("lora.targets is empty; name layers such as q_proj, or all-linear")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """The model that judges for tasks that ask for one: an engine of our own, or an endpoint where model is set."""

    checkpoint: str = ""
    """Folder of the frozen judge; empty: the checkpoint the run starts from."""
    model: str = ""
    """Name of a model behind an OpenAI-compatible endpoint, which then judges."""
    base_url: str = ""
    """Where the endpoint is, such as http://localhost:8000/v1; empty: OPENAI_BASE_URL, or OpenAI's own."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    thinking: bool = False
    """A judge in an engine of ours reasons before its verdict, if its chat format can."""
    verdict_tokens: int = 512
    """Tokens of such a judge's yes or no to one criterion, reasoning included ..."""
    max_tokens: int = 1024
    """... and of any judge's reply with verdicts on a whole rubric. An engine's has half of its window at most."""
    attempts: int = 3
    """How often a judge is asked for a reply that can be read; from the second time on it is sampled anew."""
    at_once: int = 32
    """Requests to the endpoint under way."""
    temperature: float | None = 0.0
    """Of the endpoint; None leaves it out, for models that take no other than their own."""
    seconds: float = 60.0
    """Of one request to the endpoint, as the time without a byte."""
    patience_s: float = 600.0
    """An endpoint that is down (nobody there, too many requests, errors of its own) is waited for so long: the run
    pauses. Then the episodes that need it are lost, up to their domain's max_lost."""

    def __post_init__(self) -> None:
        if self.checkpoint and self.model:
            raise ValueError(f"a judge is a checkpoint or a model, got {self.checkpoint!r} and {self.model!r}")
        if self.base_url and not self.model:
            raise ValueError(f"the endpoint {self.base_url} needs the name of its model: judge.model")
        for name in ("verdict_tokens", "max_tokens", "attempts", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge.{name} must be at least 1, got {getattr(self, name)}")
        if not self.seconds > 0 or not self.patience_s >= 0:
            numbers = f"{self.seconds} and {self.patience_s}"
            raise ValueError(f"judge.seconds must be above 0 and judge.patience_s 0 or more, got {numbers}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"judge.temperature must lie in [0, 2] (or None to leave it out), got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Settings):
    """A whole run."""

    domains: dict[str, Domain]
    out: str = ""
    """Folder of the run; empty: runs/RECIPE-DATE-TIME."""
    model: str = ""
    """What to start from: a checkpoint folder (transformers format), a .gguf file, or a name on the model hub; empty:
    the cold start makes one, once."""
    syntax: str = ""
    """How the model writes calls and reasoning: a preset of rollout/formats/syntax.py, or path.py:name of a Syntax;
    empty: as its chat template shows."""
    judge: Judge = field(default_factory=Judge)
    cold_start: ColdStart = field(default_factory=ColdStart)
    rollout: Rollout = field(default_factory=Rollout)
    sampling: Sampling = field(default_factory=Sampling)
    steps: int = 24
    """Rollout batches."""
    group_size: int = 8
    """Episodes of one prompt; advantages are centred within them."""
    minibatches: int = 4
    """Optimiser steps a rollout batch: from the second on, the data is off-policy."""
    tokens_per_microbatch: int = 8192
    precision: Literal["bf16", "fp32"] | None = None
    """What trainer and engines compute in; weights and optimiser stay in fp32. None: bf16 on a GPU, fp32 on a CPU."""
    lora: Lora = field(default_factory=Lora)
    offload: Literal["none", "reference", "optimizer", "all"] = "none"
    """What rests in host memory while it is not needed."""
    lr: float = 1e-6
    warmup_steps: int = 2
    """Rollout batches with a smaller learning rate, which rises linearly; the next one has lr."""
    lr_end_share: float = 0.1
    """Share of lr that the last rollout batch has, after a linear fall; 1 keeps it constant."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Largest norm of a gradient: of the policy's, and apart from it of the indexer's."""
    indexer_kl: float = 1.0
    """Weight of the indexer's own KL loss, whose gradient reaches the indexer alone; 0 freezes the indexer."""
    checkpoint_activations: bool = False
    """Recompute each layer in the backward pass to save memory."""
    keep_routing: bool = True
    """Replay the engine's choice of experts."""
    keep_selection: bool = False
    """Replay the engine's selection of keys in sparse attention, 2 bytes a token, layer and selected key; False: the
    policy's indexer selects for itself."""
    keep_sampling_mask: bool = True
    """Normalise log-probabilities over the ids that the sampler kept."""
    kl: Literal["unbiased", "k3", "full"] = "unbiased"
    """KL to the reference: the unbiased estimate; k3, biased off-policy, to compare; or full, summed over the whole
    vocabulary at each position that was visited, whatever the sampler kept, at the cost of its logits."""
    sandbox: Literal["isolated", "limits"] = "isolated"
    """How code of the policy may run: only enclosed (bubblewrap or namespaces), or with limits alone where nothing else
    works. What limits leave open, `trimtab doctor` says."""
    held_out: int = 64
    """Held-out prompts a domain, played before and after."""
    save_every: int = 10
    """Rollout batches between checkpoints; the two newest are kept."""
    run_gib: float = 20.0
    """What the run's folder may hold, checkpoints aside; beyond it the oldest steps' episodes are removed."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Experiment trackers to log to besides metrics.jsonl."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("domains is empty; name at least one")
        if not any(domain.prompts for domain in self.domains.values()):
            raise ValueError("no domain trains: set the prompts of one above 0")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 to centre rewards, got {self.group_size}")
        for name in ("steps", "minibatches", "tokens_per_microbatch", "held_out", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm", "run_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.lr_end_share <= 1:
            raise ValueError(f"lr_end_share must lie in [0, 1], got {self.lr_end_share}")
        for name in ("warmup_steps", "weight_decay", "indexer_kl", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def needs_reference(self) -> bool:
        """Whether any domain asks for a KL to a reference policy."""
        return bool(self.references)

    @property
    def references(self) -> tuple[str, ...]:
        """Checkpoints that a KL is taken to, each once; empty: the model that the run starts from."""
        trained = [domain for domain in self.domains.values() if domain.prompts]
        return tuple(dict.fromkeys(domain.teacher for domain in trained if domain.loss.beta > 0))

    def save(self, path: Path) -> None:
        path.write_text(self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read a configuration that `save` wrote.

        Raises:
            ValueError: the file is missing or holds something else.
        """
        return read_settings(cls, path)


S = TypeVar("S")


def read_settings(kind: type[S], path: Path) -> S:
    """Settings of one kind that a folder's config.json holds.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is not a run: it has no {path.name}") from error
    except ValidationError as error:
        raise ValueError(f"{path} is not a configuration of this version: {error}") from error
