"""The fused GPU matmul as a user of jaxzip gets it, against XLA's bf16 dot, in the same run, with cold weights.

A jitted loop, as one that generates tokens, multiplies by copies of a weight that together exceed the L2 cache, one
after another. XLA runs it as CUDA graphs; calls of it queue up, so that the wall time of many is the device's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import pathlib
import statistics

import copies
import device_time
import harness
import jax
import jax.numpy as jnp
import synthetic

import jaxzip
from jaxzip.tuning import copies_of, median_us, products, rounds_of

# (M, K) of Llama 3.1 8B (fused projections, then some of their parts), Qwen3 14B and Llama 3.1 70B.
SHAPES = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (1024, 4096), (14336, 4096),
    (7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
)  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COLD_BYTES = 420e6  # several times the L2 of an H200
FEWEST_COPIES = 8  # after each round through the copies x is changed, which takes 4 to 8 us
QUEUE_US = 60000  # what a timed queue of calls should take, about: the first call's dispatch costs 1000
# A step of a loop costs 25 us beside its products, whose instructions XLA compiles one by one.
STEP_US, MOST_PRODUCTS = 2500, 240
TRIPS = 4
LARGE = 50e6  # weights: where a matrix counts as large
DENSE, CUBLAS = "xla dot", "cublas"
AUTO = "auto"  # what jaxzip takes by itself
COMPILED_WITH = {CUBLAS: {"xla_gpu_enable_triton_gemm": False}}  # XLA's autotuning takes cuBLAS and kernels of its own


def calls_of(launches: int, expected_us: float) -> int:
    """How many calls of a program queue up for one timing."""
    return max(2, math.ceil(QUEUE_US / (launches * expected_us)))


def copy_bandwidth() -> float:
    """Bytes read and written a second by XLA's copies of 1 GiB."""
    sources = [jnp.full(1 << 28, i, jnp.uint32) for i in range(8)]
    moved = 2 * sources[0].nbytes
    copy = jax.jit(lambda sources: [source + 1 for source in sources]).lower(sources).compile()
    return moved / (median_us(copy, (sources,), 8, 5, calls_of(8, moved / 4e6)) * 1e-6)


def chosen(by: str) -> str | None:
    """The ``implementation`` that a row stands for."""
    return None if by == AUTO else by


def multiply_by(by: str):
    return lambda x, z: jaxzip.matmul(x, z, implementation=chosen(by))


def measure(shape, kind: str, args, bandwidth: float) -> list[dict]:
    """A row for each N, format and implementation."""
    m, k = shape
    w = synthetic.weights(kind, (k, m))
    count = min(64, max(FEWEST_COPIES, math.ceil(COLD_BYTES / w.nbytes)))
    # By (format, implementation); copies of a format's weight serve all of its implementations.
    dense = [DENSE, CUBLAS] if args.cublas else [DENSE]
    candidates = {(name, None): lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.bfloat16) for name in dense}
    candidates |= {(f, i): multiply_by(i) for f in args.formats for i in args.implementations}
    weights = dict.fromkeys(dense, copies_of(w, count))
    weights |= {f: copies_of(jaxzip.compress(w, format=f), count) for f in args.formats}

    expected_us = w.nbytes / bandwidth * 1e6
    rounds = rounds_of(count, min(MOST_PRODUCTS, math.ceil(STEP_US / expected_us)))
    launches = rounds * TRIPS * count

    def build(job):
        name, n = job
        arguments = (jax.random.normal(jax.random.key(n), (n, k), jnp.bfloat16), weights[name[0]])
        lowered = products(candidates[name], rounds, TRIPS).lower(*arguments)
        return arguments, lowered.compile(compiler_options=COMPILED_WITH.get(name[0]))

    jobs = [(name, n) for n in args.n for name in candidates]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        built = dict(zip(jobs, pool.map(build, jobs)))
    found = []
    for n in args.n:
        us, device_us = {}, {}
        for name in candidates:
            arguments, compiled = built[name, n]
            us[name] = median_us(compiled, arguments, launches, args.repeats, calls_of(launches, expected_us))
            if args.profile:
                ran = device_time.kernels(functools.partial(compiled, *arguments))
                device_us[name] = device_time.busy_us(ran) / launches
        for name, implementation in candidates:
            if name in dense:
                continue
            z, own = weights[name][0], (name, implementation)
            moved = z.nbytes + 2 * n * (m + k)
            floor = moved / bandwidth * 1e6
            if min(us.values()) < floor / 2:
                raise RuntimeError(
                    f"M={m}, K={k}, N={n}: {us} us, memory alone takes {floor:.1f}: XLA dropped products"
                )
            row = {"M": m, "K": k, "N": n, "weights": kind, "format": name, "by": implementation}
            row |= {"bits": z.bits_per_weight, "us": us[own]} | {f"{d} us": us[d, None] for d in dense}
            row |= {"ratio": us[DENSE, None] / us[own], "TB/s": moved / us[own] / 1e6}
            row |= {"floor us": floor, "share of floor": floor / us[own]}
            if args.profile:
                row |= {"device us": device_us[own]} | {f"{d} device us": device_us[d, None] for d in dense}
            found.append(row)
    return found


def measure_decompression(shape, kind: str, args, bandwidth: float) -> list[dict]:
    """A row for each format, order and implementation."""
    m, k = shape
    found = []
    for name, axis in itertools.product(args.formats, (-1, -2)):
        w = synthetic.weights(kind, (k, m))  # of which outputs, not inputs, differ in scale
        w = w if axis == -1 else jnp.copy(w.T)
        z = jaxzip.compress(w, format=name, output_axis=axis)
        moved = z.nbytes + w.nbytes
        zs = copies_of(z, min(64, max(FEWEST_COPIES, math.ceil(COLD_BYTES / z.nbytes))))
        launches, arguments = TRIPS * len(zs), (jnp.zeros((1, 1), jnp.bfloat16), zs)
        calls = calls_of(launches, moved / bandwidth * 1e6)
        copy_us = copies.copy_us(moved, COLD_BYTES, args.repeats, calls)
        for implementation in args.implementations:
            decode = functools.partial(jaxzip.decompress, implementation=chosen(implementation))
            program = products(lambda _, z: decode(z), 1, TRIPS).lower(*arguments).compile()
            us = median_us(program, arguments, launches, args.repeats, calls)
            if us < moved / bandwidth * 1e6 / 2:
                raise RuntimeError(f"M={m}, K={k}: {us} us a decompression, more than memory can do")
            found.append(
                {"M": m, "K": k, "weights": kind, "format": name, "by": implementation}
                | {"order": "[K, M]" if axis == -1 else "[M, K]", "us": us}
                | {"TB/s": moved / us / 1e6, "share of copy": copy_us / us}
                | {"share of copy of 1 GiB": moved / us * 1e6 / bandwidth}
            )
    return found


def means(rows: list[dict]) -> list[dict]:
    """Geometric means of the ratio, by format, implementation, kind of weights, size of the matrix and N.

    Where there are several implementations, also of the best of them for each shape, whatever jaxzip takes by itself.
    """
    ratios: dict[tuple, list[float]] = {}
    best: dict[tuple, float] = {}
    for row in rows:
        size = "M*K >= 50M" if row["M"] * row["K"] >= LARGE else "smaller"
        group = row["format"], row["weights"], size, row["N"]
        ratios.setdefault((*group, row["by"]), []).append(row["ratio"])
        shape = (*group, row["M"], row["K"])
        if row["by"] != AUTO:
            best[shape] = max(best.get(shape, 0), row["ratio"])
    if len({row["by"] for row in rows} - {AUTO}) > 1:
        for (*group, _, _), ratio in best.items():
            ratios.setdefault((*group, "best"), []).append(ratio)
    return [
        {"format": f, "weights": w, "size": s, "N": n, "by": by, "shapes": len(r)}
        | {"geometric mean": statistics.geometric_mean(r), "least": min(r)}
        for (f, w, s, n, by), r in sorted(ratios.items())
    ]


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Ratio to the dense dot against N, a line a shape, a panel a format and implementation."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["weights"] == "real"] or rows
    # Results from before there were several implementations do not name theirs.
    kinds = list(dict.fromkeys((row["format"], row.get("by", "ffi")) for row in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(7 * len(kinds), 5), squeeze=False, sharey=True)
    for panel, (name, by) in zip(panels[0], kinds):
        for shape in dict.fromkeys((row["M"], row["K"]) for row in rows):
            own = [r for r in rows if (r["M"], r["K"], r["format"], r.get("by", "ffi")) == (*shape, name, by)]
            line = [(r["N"], r["ratio"]) for r in own]
            if line:
                panel.plot(*zip(*sorted(line)), marker=".", label=f"{shape[0]} x {shape[1]}")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{name}, {by}: fused matmul on encoded weights")
        panel.set_xlabel("N (rows of x)")
    panels[0][0].set_ylabel("time of XLA's bf16 dot / time of jaxzip")
    panels[0][-1].legend(fontsize=7, ncols=2, title="M x K")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=[f"{m}x{k}" for m, k in SHAPES], help="MxK, output x input")
    parser.add_argument("--weights", nargs="+", default=["real"], choices=synthetic.KINDS)
    parser.add_argument("--formats", nargs="+", default=["lane-planar"])
    parser.add_argument("--implementations", nargs="+", default=["ffi"], help=f"of the operations: ffi, pallas, {AUTO}")
    parser.add_argument("--cublas", action="store_true", help="also XLA's dot without kernels of XLA's own")
    parser.add_argument("--profile", action="store_true", help="also the profiler's times")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="gpu_kernels", help="of the files under bench/results")
    parser.add_argument("--plot", metavar="JSON", help="only draw the plot of an earlier result")
    args = parser.parse_args()
    if args.plot:
        source = pathlib.Path(args.plot)
        plot(json.loads(source.read_text())["rows"], source.with_suffix(".png"))
        return
    if jax.default_backend() != "gpu":
        parser.error("no NVIDIA GPU: these are GPU kernels; bench/cpu_matmul.py measures the CPU's")
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in args.shapes]
    bandwidth = copy_bandwidth()
    rows, decompression = [], []
    for kind in args.weights:
        for shape in shapes:
            rows += measure(shape, kind, args, bandwidth)
            decompression += measure_decompression(shape, kind, args, bandwidth)
            content = {
                "setup": {
                    "weights": {name: synthetic.ABOUT[name] for name in args.weights},
                    "cold": f"{FEWEST_COPIES} copies or more, of {COLD_BYTES / 1e6:.0f} MB of dense weights or more",
                    "times": "us a launch: wall time of queued calls of a jitted loop over their launches, median",
                    DENSE: "jnp.dot(x, w[K, M]) in bf16 by XLA, its autotuning on, same run",
                    CUBLAS: f"the same program compiled with {COMPILED_WITH[CUBLAS]}" if args.cublas else "not run",
                    "device us": "a launch's, of the profiler: at least one kernel ran" if args.profile else "not run",
                    "copy bandwidth TB/s": bandwidth / 1e12,
                    "share of copy": "of the speed of a copy that reads and writes as many bytes in all, same run",
                    "floor": "bytes of payload, x and y over the copy bandwidth",
                },
                "means": means(rows),
                "rows": rows,
                "decompress": decompression,
            }
            path = harness.write_result(args.name, content)  # after each shape: a run that is cut off leaves the rest
    harness.show(f"y[N, M] = x[N, K] @ W, {jax.devices()[0].device_kind}", rows)
    harness.show("decompress", decompression)
    harness.show("means", means(rows))
    plot(rows, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
