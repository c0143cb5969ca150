"""`trimtab convert`: a dense checkpoint with latent attention becomes a sparse one."""

from pathlib import Path

from trimtab.grpo.setup.models import locate
from trimtab.grpo.stages.config import Indexer
from trimtab.grpo.stages.convert import INDEXER_FILE, convert


def run(source: str, out: Path, indexer: Indexer) -> int:
    """Convert, and print what was added and left out.

    Raises:
        ValueError: what stages.convert refuses.
    """
    done = convert(locate(source), out, indexer)
    print(f"{done.summary} in {out}")
    print(f"  copied  {done.parameters:,} parameters, {(done.bytes - done.added_bytes) / 1e6:,.1f} MB, as they are")
    share = done.added / done.parameters
    print(f"  added   {done.added:,} parameters ({share:.1%}), {done.added_bytes / 1e6:,.1f} MB, in {INDEXER_FILE}:")
    print(
        f"          indexers of {indexer.index_n_heads} heads of {indexer.index_head_dim}, top {indexer.index_topk}, "
        "untrained: up to as many keys it computes what it did; beyond, warm it up first"
    )
    for what in done.left_out:
        print(f"  left    {what}")
    return 0
