"""What a run keeps on the GPU, byte by byte, before it starts: whether it fits, and what would make it fit.

Sizes come from config.json and the configuration alone; no torch. Parameters, optimiser and cache are exact. The rest
is an estimate on the high side, each function's docstring says of what; RESERVE covers fragmentation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from rich.table import Table

from trimtab.grpo.config import Config, resolved
from trimtab.grpo.cost.shape import Layer, Shape

GIB = 2**30
MIB = 2**20
RESERVE = 0.06
"""Share of the GPU that is left alone: the allocators' fragments, and what the estimates miss."""
ENOUGH = 0.25
"""Engines stay awake only if the cache then holds this share of the windows it could use: few sequences fill theirs."""
CONTEXT = GIB // 2
"""What CUDA and its libraries take for each process."""
GRAPHS = GIB // 2
CHUNK = 256 * MIB
"""Weights travel to the engine in buffers of this size, or of the largest tensor's."""
BATCHED_TOKENS = 4096
"""Tokens that an engine reads in one step."""
KEPT_IDS = 64
"""Kept ids a sampled token: more than top-p leaves on average."""
CPU_CACHE = GIB
"""The largest cache that is proposed on a CPU."""

Moment = Literal["reference", "backward", "step", "weights", "sampling"]
MOMENTS: tuple[Moment, ...] = ("reference", "backward", "step", "weights", "sampling")
"""The reference's pass; forward and backward; the optimiser's step; weights on their way; sampling."""
BUSY: tuple[Moment, ...] = ("reference", "backward", "step")
"""The trainer works; an engine may sleep."""
NAMES = {
    "reference": "the reference's pass",
    "backward": "the forward and backward pass",
    "step": "the optimiser's step",
    "weights": "the hand-over of weights",
    "sampling": "sampling",
}


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes of one kind, and when they are on the GPU: an engine's if it sleeps while the trainer works."""

    owner: Literal["trainer", "engine", "both"]
    name: str
    size: int
    moments: tuple[Moment, ...] = MOMENTS


@dataclass(frozen=True, slots=True)
class Ledger:
    """All items of a run on the trainer's GPU."""

    items: tuple[Item, ...]

    def at(self, moment: Moment, *, sleep: bool) -> int:
        """Bytes on the GPU at a moment; an engine that does not sleep keeps all it has."""
        return sum(i.size for i in self.items if moment in i.moments or (i.owner == "engine" and not sleep))

    def peak(self, *, sleep: bool) -> tuple[int, Moment]:
        """The most bytes at any moment, and the moment."""
        return max((self.at(moment, sleep=sleep), moment) for moment in MOMENTS)

    @property
    def totals(self) -> dict[str, int]:
        """What the three ways of sharing the GPU come to."""
        return {
            "engine awake beside trainer": max(self.at(moment, sleep=False) for moment in BUSY),
            "engine asleep while training": max(self.at(moment, sleep=True) for moment in BUSY),
            "trainer resting while sampling": self.at("sampling", sleep=True),
        }

    def table(self, plan: "Plan", gpu_bytes: int) -> Table:
        """The ledger as a person reads it."""
        table = Table(title=f"memory of the GPU: {_gib(gpu_bytes)} GiB", title_justify="left")
        for header, justify in (("", "left"), ("", "left"), ("GiB", "right"), ("on the GPU", "left")):
            table.add_column(header, justify=justify)  # type: ignore[arg-type]
        for item in self.items:
            always = item.moments == MOMENTS or (item.owner == "engine" and not plan.sleep)
            when = "always" if always else ", ".join(item.moments)
            table.add_row(item.owner, item.name, _gib(item.size), when)
        table.add_section()
        for name, total in self.totals.items():
            table.add_row("", name, _gib(total), "")
        asleep = "engine sleeps while the policy trains" if plan.sleep else "engine stays awake"
        table.caption = f"{asleep}; its cache holds {plan.windows} sequences of the longest kind"
        return table


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run shares its GPU."""

    sleep: bool
    kv_cache_mib: int
    windows: int
    """Sequences of max_len that the cache holds."""
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class Beside:
    """The models of a run besides its policy."""

    judge: Shape | None = None
    """Of a judge's own engine, which stays awake."""
    teachers: tuple[Shape, ...] = ()
    """References other than the model that the run starts from."""
    trains: bool = True
    """False: the policy only samples."""


ALONE = Beside()


def choose(config: Config, shape: Shape, gpu_bytes: int | None, *, beside: Beside = ALONE) -> Plan:
    """Whether engines sleep, and how large a cache they get; what config.rollout sets stays.

    Args:
        config: resolved, but for rollout.sleep and rollout.kv_cache_mib.
        gpu_bytes: of the GPU that trainer and engines share; None: a CPU, where nothing is refused.

    Raises:
        ValueError: it cannot fit; with the remedy that would make it fit.
    """
    if gpu_bytes is None:
        useful = min(_useful(config, shape), max(CPU_CACHE, _window(config, shape)))
        return _plan(config, shape, beside, False, (config.rollout.kv_cache_mib or 0) * MIB or useful)
    plan = _fitting(config, shape, gpu_bytes, beside)
    if plan is None:
        raise ValueError(_refusal(config, shape, gpu_bytes, beside))
    return plan


def least(config: Config, shape: Shape, *, beside: Beside = ALONE) -> int:
    """Bytes of the smallest GPU that would do: with the cache asked for, or that of one window; RESERVE included."""
    return _need(config, shape, beside)[0]


def count(config: Config, shape: Shape, cache: int, *, beside: Beside = ALONE) -> Ledger:
    """All bytes of a run whose engines have a cache of so many bytes each."""
    judge = _judge(config, beside.judge, cache) if beside.judge else ()
    trainer = _trainer(config, shape, beside.teachers) if beside.trains else ()
    items = (*trainer, *_engine(config, shape, cache), *judge)
    return Ledger(tuple(item for item in items if item.size))


def _fitting(config: Config, shape: Shape, gpu_bytes: int, beside: Beside) -> Plan | None:
    room = int(gpu_bytes * (1 - RESERVE))
    asked, free_to_sleep = config.rollout.kv_cache_mib, config.rollout.sleep is None
    for sleep in (False, True) if free_to_sleep else (bool(config.rollout.sleep),):
        left = min(_useful(config, shape), _left(config, shape, room, beside, sleep))
        cache = asked * MIB if asked else left
        plan = _plan(config, shape, beside, sleep, cache)
        least = ENOUGH * _useful(config, shape) if free_to_sleep and not sleep and not asked else 0
        if cache >= max(least, _window(config, shape)) and plan.ledger.peak(sleep=sleep)[0] <= room:
            return plan
    return None


def _left(config: Config, shape: Shape, room: int, beside: Beside, sleep: bool) -> int:
    """The largest cache for which all caches fit, in whole MiB, at every moment."""
    empty, small = (count(config, shape, cache, beside=beside) for cache in (0, MIB))
    mib = []
    for moment in MOMENTS:
        without = empty.at(moment, sleep=sleep)
        caches = (small.at(moment, sleep=sleep) - without) // MIB
        mib += [(room - without) // (caches * MIB)] if caches else []
    return min(mib) * MIB


def _plan(config: Config, shape: Shape, beside: Beside, sleep: bool, cache: int) -> Plan:
    return Plan(
        sleep=sleep,
        kv_cache_mib=-(-cache // MIB),
        windows=max(cache, 0) // _window(config, shape),
        ledger=count(config, shape, max(cache, 0), beside=beside),
    )


def _refusal(config: Config, shape: Shape, gpu_bytes: int, beside: Beside) -> str:
    sleep = config.rollout.sleep is not False
    needed, moment = _need(config, shape, beside)
    said = f"the run needs {_gib(needed)} GiB in {NAMES[moment]}, {'engines asleep' if sleep else 'engines awake'}"
    said += f", and this GPU has {_gib(gpu_bytes)}"
    for words, smaller in _remedies(config):
        if _fitting(smaller, shape, gpu_bytes, beside):
            return f"{said}; with {words} it needs {_gib(_need(smaller, shape, beside)[0])}"
    return f"{said}; take a GPU of {-(-needed // GIB)} GiB or a smaller model"


def _need(config: Config, shape: Shape, beside: Beside) -> tuple[int, Moment]:
    """What `least` returns, and the moment that needs it."""
    cache = (config.rollout.kv_cache_mib or 0) * MIB or _window(config, shape)
    peak, moment = count(config, shape, cache, beside=beside).peak(sleep=config.rollout.sleep is not False)
    return int(peak / (1 - RESERVE)), moment


def _remedies(config: Config) -> Iterator[tuple[str, Config]]:
    """What can be given up, the cheapest first, and the configuration without it."""
    rollout = config.rollout
    open_rollout = replace(rollout, sleep=None if rollout.sleep is False else rollout.sleep, kv_cache_mib=None)
    prefix = ""
    if open_rollout != rollout:
        config = replace(config, rollout=open_rollout)
        prefix = "rollout.sleep and rollout.kv_cache_mib left out"
        yield prefix, config
    ranks = (0,) if config.lora.rank else (0, 16)
    tokens = [config.tokens_per_microbatch]
    while tokens[-1] // 2 >= resolved(rollout.max_len):
        tokens.append(tokens[-1] // 2)
    offloads = ("", "reference", "optimizer", "all") if config.offload == "none" else ("",)
    for rank, size, offload, recompute in product(ranks, tokens, offloads, (False, True)):
        changes: dict[str, tuple[str, Any]] = {}
        if rank:
            changes["lora"] = f"--lora.rank {rank}", replace(config.lora, rank=rank)
        if size != config.tokens_per_microbatch:
            changes["tokens_per_microbatch"] = f"--tokens-per-microbatch {size}", size
        if offload:
            changes["offload"] = f"--offload {offload}", offload
        if recompute and not config.checkpoint_activations:
            changes["checkpoint_activations"] = "--checkpoint-activations", True
        if changes:
            words = " ".join(option for option, _ in changes.values())
            words = f"{prefix} and {words}" if prefix else words
            yield words, replace(config, **{name: value for name, (_, value) in changes.items()})


def _bytes(config: Config) -> int:
    return 4 if config.precision == "fp32" else 2


def _window(config: Config, shape: Shape) -> int:
    """Cache of the longest sequence."""
    return resolved(config.rollout.max_len) * shape.cached * _bytes(config)


def _useful(config: Config, shape: Shape) -> int:
    """Cache of all sequences that an engine decodes together, each of the longest kind."""
    episodes = config.group_size * sum(domain.prompts for domain in config.domains.values())
    return min(config.rollout.max_num_seqs, -(-episodes // config.rollout.actors)) * _window(config, shape)


def _trainer(config: Config, shape: Shape, teachers: tuple[Shape, ...]) -> Iterator[Item]:
    """What learns has masters, gradients and Adam's moments in fp32, 16 bytes a parameter. Beside adapters the weights
    rest in the compute type, and are their own reference."""
    whole, rank, offload = shape.parameters * _bytes(config), config.lora.rank, config.offload
    learning = adapter_parameters(config, shape) if rank else shape.parameters
    weights: tuple[Moment, ...] = (*BUSY, "weights") if offload == "all" else MOMENTS
    yield Item("trainer", "CUDA context", CONTEXT)
    if rank:
        yield Item("trainer", "frozen weights", whole, weights)
    yield Item("trainer", "masters in fp32", learning * 4, weights)
    yield Item("trainer", "Adam's moments", learning * 8, ("step",) if offload in ("optimizer", "all") else MOMENTS)
    yield Item("trainer", "gradients", learning * 4, ("backward", "step"))
    frozen = [one.parameters * _bytes(config) for one in teachers]
    frozen += [whole] if "" in config.references and not rank else []
    if offload in ("reference", "all"):  # one at a time
        yield Item("trainer", "reference", max(frozen, default=0), ("reference",))
        if config.kl == "full":
            heads = len(config.references) * shape.head * _bytes(config)
            yield Item("trainer", "heads of resting references", heads, ("reference", "backward", "step"))
    else:
        yield Item("trainer", "reference" if len(frozen) < 2 else f"{len(frozen)} references", sum(frozen))
    if config.needs_reference:
        yield Item("trainer", "reference's activations", reading(config, shape), ("reference",))
    yield Item("trainer", "layers gathered to compute", gathered(config, shape), ("backward", "weights"))
    yield Item("trainer", "activations", activations(config, shape), ("backward",))
    yield Item("trainer", "head", head(config, shape), ("backward",))
    if config.keep_selection:
        yield Item("trainer", "replayed selections", budget(config) * 2 * selected(shape), ("backward",))


def _engine(config: Config, shape: Shape, cache: int) -> Iterator[Item]:
    engines = config.rollout.actors
    awake: tuple[Moment, ...] = ("weights", "sampling")
    yield Item("engine", "CUDA context", CONTEXT * engines)
    yield Item("engine", "CUDA graphs", GRAPHS * engines if config.rollout.graphs is not False else 0)
    yield Item("engine", "workspace", workspace(config, shape) * engines)
    if config.keep_selection:
        yield Item("engine", "selections of a step", BATCHED_TOKENS * 4 * selected(shape) * engines)
    yield Item("engine", "weights", shape.parameters * _bytes(config) * engines, awake)
    yield Item("engine", "key-value cache", cache * engines, ("sampling",))
    largest = max(shape.head, *(_largest(layer) for layer in shape.layers)) * _bytes(config)
    yield Item("both", "buffer of weights on their way", max(CHUNK, largest), ("weights",))


def _judge(config: Config, shape: Shape, cache: int) -> Iterator[Item]:
    graphs = GRAPHS if config.rollout.graphs is not False else 0
    yield Item("engine", "judge's context and workspace", CONTEXT + graphs + workspace(config, shape))
    yield Item("engine", "judge's weights", shape.parameters * _bytes(config))
    yield Item("engine", "judge's cache", cache)


def adapter_parameters(config: Config, shape: Shape) -> int:
    """Parameters of the adapters: rank times the widths in and out of each product that gets one."""
    chosen = config.lora.targets
    widths = 0
    for layer in shape.layers:
        products = {**layer.matrices, **(layer.indexer.matrices(layer.hidden) if layer.indexer else {})}
        for name, (width_in, width_out) in products.items():
            fits = name not in ("gate", "weights_proj")  # routers are no linear layers; both stay in fp32
            widths += (width_in + width_out) * (fits and ("all-linear" in chosen or name in chosen))
    return config.lora.rank * widths


def gathered(config: Config, shape: Shape) -> int:
    """Copies in the compute type: embedding and head for the whole pass, two layers at a time, and the gradients of
    the largest of these units, in both types, on their way to the masters. None in fp32, which computes in place."""
    if config.precision == "fp32":
        return 0
    layer = max(layer.parameters for layer in shape.layers)
    gradients = 0 if config.lora.rank else max(layer, shape.outside_layers) * (2 + 4)
    return (shape.outside_layers + 2 * layer) * 2 + gradients


def saved(config: Config, layer: Layer) -> int:
    """Bytes a token that the backward pass of a layer needs.

    Inputs, normalised inputs and outputs of its two norms (6 hidden); what attention keeps (shape.py: where keys are
    selected, the larger of its two forms); gate, up, silu(gate) and their product of the gated MLP (4 widths); for each
    chosen expert the token's row and output and four of its width; in fp32 the router's scores three times. Of the
    indexer queries and keys twice, and in fp32 scores, probabilities and ids of the selected keys.
    """
    window = resolved(config.rollout.max_len)
    selects = layer.topk is not None and window > layer.topk
    values = 6 * layer.hidden + max(layer.attention.saved(absorbed) for absorbed in {False, selects})
    values += 4 * layer.mlp.width if layer.mlp else 0
    fp32 = 0
    if experts := layer.experts:
        values += experts.chosen * (2 * layer.hidden + 4 * experts.width)
        fp32 += 3 * experts.total
    if indexer := layer.indexer:
        values += 2 * (indexer.heads + 1) * indexer.width
        fp32 += 3 * min(layer.topk or window, window)
    return values * _bytes(config) + fp32 * 4


def budget(config: Config) -> int:
    """Tokens of the largest pack: a sequence is never cut."""
    return max(config.tokens_per_microbatch, resolved(config.rollout.max_len))


def activations(config: Config, shape: Shape) -> int:
    """What all layers save for the backward pass at the token budget, or with checkpoints their inputs; then one
    layer's again, as its gradients are under way (with checkpoints twice: it is computed anew)."""
    each = [saved(config, layer) for layer in shape.layers]
    inputs = len(each) * shape.hidden * _bytes(config)
    a_token = inputs + 2 * max(each) if config.checkpoint_activations else sum(each) + max(each)
    return budget(config) * a_token


def reading(config: Config, shape: Shape) -> int:
    """A pass without gradients holds one layer's values."""
    return budget(config) * max(saved(config, layer) for layer in shape.layers) + head(config, shape)


def head(config: Config, shape: Shape) -> int:
    """Embedding, last hidden state, its copy at sampled tokens and its gradient (fp32); logits of the kept ids with
    ids and gradients (16 bytes each), or two blocks of the whole vocabulary's in fp32."""
    tokens = budget(config)
    ids = min(tokens * shape.vocabulary, 2**27) * 8
    logits = tokens * KEPT_IDS * 16 if config.keep_sampling_mask else ids
    return tokens * shape.hidden * (3 * _bytes(config) + 4) + min(logits, ids)


def workspace(config: Config, shape: Shape) -> int:
    """An engine's step: what one layer computes for its longest batch of tokens, and the sampler's logits, their sorted
    copy and ids (int64), probabilities and mask: 24 bytes an id."""
    layer = max(saved(config, layer) for layer in shape.layers)
    return BATCHED_TOKENS * layer + config.rollout.max_num_seqs * shape.vocabulary * 24


def selected(shape: Shape) -> int:
    """Keys that the indexers of all layers select for a token."""
    return sum(layer.topk or 0 for layer in shape.layers)


def table_row(shape: Shape) -> int:
    """Bytes of host memory that an engine keeps for each token of its cache where selections are recorded: 16 bits for
    every selected key, and in every layer for every chosen expert."""
    experts = max((layer.experts.chosen for layer in shape.layers if layer.experts), default=0)
    return 2 * (selected(shape) + len(shape.layers) * experts)


def check_table(config: Config, shape: Shape, host_bytes: int) -> None:
    """The tables of selections must fit the host.

    Args:
        config: with rollout.kv_cache_mib.

    Raises:
        ValueError: they do not; with the cache that would do.
    """
    cache, engines = resolved(config.rollout.kv_cache_mib), config.rollout.actors
    a_token = shape.cached * _bytes(config)
    tables = engines * (cache * MIB // a_token) * table_row(shape)
    if tables > host_bytes:
        fits = int(host_bytes / tables * cache / 2)
        raise ValueError(
            f"keep_selection takes {_gib(tables)} GiB of host memory, {table_row(shape)} bytes for each token of the "
            f"engines' caches, and this host has {_gib(host_bytes)}; with --rollout.kv-cache-mib {fits} it takes half "
            "of that, or leave it out"
        )


def _largest(layer: Layer) -> int:
    """The largest tensor of a layer as it travels: stacked experts, or a product's weight."""
    stacked = layer.experts.total * 2 * layer.hidden * layer.experts.width if layer.experts else 0
    return max(stacked, *(width_in * width_out for width_in, width_out in layer.matrices.values()))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
