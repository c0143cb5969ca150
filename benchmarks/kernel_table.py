"""Time and memory of the kernels on one GPU, beside other people's and beside what the machine could do at best.

    python benchmarks/kernel_table.py  everything, about three minutes
    python benchmarks/kernel_table.py sparse --out DIR  one part: sparse, indexer, head, kl, layer or crossover
    python benchmarks/kernel_table.py plot --out DIR  draw what an earlier run wrote, which may have been cut short
    python benchmarks/kernel_table.py --tilelang FOLDER  in the end TileLang's examples/deepseek_v32, minutes to compile

Prints a table, writes DIR/kernels.json row by row and draws DIR/kernels.png. The floor is the larger of a kernel's
arithmetic at the rate of a large matrix product and its traffic at the bandwidth of a large copy, both measured first.
Errors are relative: ours against float64 on a sample of queries, others' against ours.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import triton
from kernel_attention import crossover, sparse, tilelang_attention
from kernel_common import H, K, S, Table, measure_ceilings, short, stopwatch
from kernel_head import head
from kernel_indexer import indexer, kl, tilelang_indexer
from kernel_layer import layer

PARTS = {"sparse": sparse, "indexer": indexer, "head": head, "kl": kl, "layer": layer, "crossover": crossover}


def draw(folder: Path) -> None:
    """Time against S_kv of the attention kernels, and time and memory of a layer against tokens; what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    rows = json.loads((folder / "kernels.json").read_text())["rows"]
    kernels = [row for row in rows if row["part"] == "sparse" and row["sizes"]["H"] == H]
    layers = [row for row in rows if row["part"] == "layer"]
    panels = []
    if kernels:
        ours = [row | {"kernel": "floor of the forward"} for row in kernels if row["kernel"] == "sparse forward"]
        lines = lines_of(kernels, "S_kv", "ms") | lines_of(ours, "S_kv", "floor_ms")
        panels.append((f"{S} queries, {H} heads, {K} selected keys", "keys", "ms", lines))
    if layers:
        panels.append(("A layer, forward and backward", "tokens", "ms", lines_of(layers, "N", "ms")))
        panels.append(("A layer, peak memory", "tokens", "GiB", lines_of(layers, "N", "extra_gib")))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False)
    for axis, (title, x_label, y_label, lines) in zip(axes[0], panels, strict=True):
        for name, points in lines.items():
            style = "k--" if name.startswith("floor") else "o-"
            axis.plot(*zip(*points, strict=True), style, label=name, linewidth=1.2, markersize=4)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        axis.set_xticks(ticks, [short(x) for x in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "kernels.png", dpi=150)


def lines_of(rows: list[dict], x: str, y: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault(row["kernel"], []).append((row["sizes"][x], row[y]))
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all", "plot"), default="all")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/kernels"), help="folder for kernels.json and kernels.png"
    )
    parser.add_argument("--tilelang", type=Path, help="folder with TileLang's examples/deepseek_v32")
    arguments = parser.parse_args()
    if arguments.part == "plot":
        return draw(arguments.out)
    if not torch.cuda.is_available():
        sys.exit("no GPU: these times mean nothing on a CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    table = Table(measure_ceilings(), arguments.out / "kernels.json")
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in table.ceilings.flops.items())
    table.say(f"{machine}: {rates}, copy {table.ceilings.bandwidth / 1e9:.0f} GB/s")
    try:
        for part in PARTS if arguments.part == "all" else (arguments.part,):
            with stopwatch(part), table.attempt(part):
                PARTS[part](table)
        if arguments.tilelang:
            with stopwatch("TileLang"), table.rival("TileLang"):
                tilelang_attention(table, arguments.tilelang)
                tilelang_indexer(table, arguments.tilelang)
    finally:  # Ctrl-C too
        with table.attempt("plot"):
            draw(arguments.out)
    if table.failures:
        sys.exit("not measured:\n" + "\n".join(table.failures))


if __name__ == "__main__":
    main()
