"""Tokens per second of whole models on a GPU, dense and compressed through the same loop.

Models have the shapes of released ones and synthetic weights. One layer is made and encoded; the others are copies of
it in memory of their own, so that every step reads as many bytes as a real model's. What is measured is `generate`'s
own programs: prefill with the first token, then the decode loop, whose cache is donated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import gc
import importlib
import json
import pathlib
import statistics
import tempfile
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import synthetic
from jaxzip.models import GREEDY, Gemma3Config, LlamaConfig, Qwen3Config, family_of, fuse_projections
from jaxzip.models.config import DecoderConfig
from jaxzip.models.decoder import Decoder
from jaxzip.models.memory_plan import memory_plan

import jaxzip
from jaxzip.tensor import CompressedTensor

loop = importlib.import_module("jaxzip.models.generate")

_COMMON = {"num_kv_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 5e5}
MODELS = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, **_COMMON
    ),
    "llama-3.1-70b": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, **_COMMON
    ),
    "qwen3-14b": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=17408, num_layers=40, num_heads=40, num_kv_heads=8,
        head_dim=128, max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6,
    ),
    "gemma-3-12b": Gemma3Config(
        vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_layers=48, num_heads=16, num_kv_heads=8,
        head_dim=256, max_position_embeddings=131072, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
        sliding_window=1024, layer_types=(("sliding_attention",) * 5 + ("full_attention",)) * 8,
    ),
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
        max_position_embeddings=4096,
    ),
}  # fmt: skip
NOTES = {"llama-3.1-70b": "as many layers as fit dense"}
DENSE = "dense"
#: Share of the device's memory that a dense model may take.
ROOM = 0.93
#: Kernels by what they are for, by parts of their names or of the operation that they come from; the rest is "rest".
PARTS = {
    "matmul": (
        "matmul",
        "gemm",
        "nvjet",
        "cutlass",
        "gemv",
        "splitk",
        "dot_general",
        "lane_planar",
        "tca_tbe",
        "decode_chain",
    ),
    "attention": ("attend", "attention", "gather_chunks"),
}


def copy_bandwidth() -> float:
    """Bytes read and written a second by XLA's copies of 1 GiB, whose dispatch costs little against them."""
    copy = jax.jit(lambda a: a ^ jnp.uint32(1))
    a = jax.block_until_ready(copy(jnp.zeros(1 << 28, jnp.uint32)))
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            a = copy(a)
        jax.block_until_ready(a)
        rates.append(8 * 2 * a.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def with_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    """The same model with fewer layers."""
    types = {"layer_types": config.layer_types[:layers]} if hasattr(config, "layer_types") else {}
    return dataclasses.replace(config, num_layers=layers, **types)


def dense_layer(config: DecoderConfig, kind: str) -> dict:
    """Parameters of the first layer and of what is there once, dense, on the device, by the model's names."""
    params = family_of(config)(with_layers(config, 1)).to_params()
    seeds = iter(range(1000))

    def draw(leaf):
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        return synthetic.weights(kind, leaf.shape, seed=next(seeds))

    return jax.tree.map(draw, params)


def encode(params: dict, format: str) -> dict:
    """Encodes matrices, several at a time on the host's cores."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)

    def one(item):
        path, leaf = item
        if leaf.ndim < 2:
            return leaf
        axis = -2 if "embedding" in jax.tree_util.keystr(path) else -1
        return jaxzip.compress(np.asarray(leaf), format=format, output_axis=axis, on_host=True)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return jax.tree.unflatten(treedef, list(pool.map(one, paths)))


def whole_model(config: DecoderConfig, params: dict, chain: bool) -> Decoder:
    """A model of ``config.num_layers`` layers, each with a copy of the first one's weights."""
    fused = jax.tree.map(jnp.asarray, fuse_projections(params))
    first = fused["layers"]["0"]
    layers = {str(i): jax.tree.map(jnp.copy, first) for i in range(1, config.num_layers)}
    model = family_of(config).from_params(config, {**fused, "layers": {"0": first, **layers}})
    model.chain = chain
    return model


def setup(model: Decoder, batch: int, prompt: int, new: int):
    tokens = np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    return loop._Setup.of(model, tokens, new, GREEDY, None, (), 0)


def compile_programs(s):
    """Prefill and decode, with the seconds that each took to trace and compile."""
    start = time.perf_counter()
    prefill = loop._start.lower(s.static, False, s.weights, s.inputs).compile()
    middle = time.perf_counter()
    run = jax.eval_shape(lambda w, i: loop._prefill(s.static, False, w, i), s.weights, s.inputs)
    until = jax.ShapeDtypeStruct((), jnp.int32)
    decode = loop._advance.lower(s.static, s.weights, s.inputs, run, until, s.static.look_every).compile()
    return prefill, decode, {"prefill": middle - start, "decode": time.perf_counter() - middle}


def weight_bytes(model: Decoder) -> tuple[int, int]:
    """Bytes of all weights, and of those that a decode step reads: all but the embedding, of which it reads rows."""
    params = model.to_params()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    unread = 0 if model.config.tie_word_embeddings else size(params["embedder"])
    return size(params), size(params) - unread


def measure(model: Decoder, batch: int, prompt: int, new: int, repeats: int, bandwidth: float, split: bool) -> dict:
    s = setup(model, batch, prompt, new)
    prefill, decode, compiling = compile_programs(s)
    steps = -(-(new - 1) // s.static.look_every) * s.static.look_every
    first, rest, tokens = [], [], None
    for _ in range(repeats + 1):  # the first one warms up
        run = None  # one cache at a time
        start = time.perf_counter()
        run = jax.block_until_ready(prefill(s.weights, s.inputs))
        middle = time.perf_counter()
        run = jax.block_until_ready(decode(s.weights, s.inputs, run, np.int32(1 + steps)))
        first.append(middle - start)
        rest.append(time.perf_counter() - middle)
        found = np.asarray(run.tokens)[:, :new]
        assert tokens is None or np.array_equal(tokens, found), "two runs gave different tokens"
        tokens = found
    first, seconds = statistics.median(first[1:]), statistics.median(rest[1:])
    config, (all_bytes, read_bytes) = model.config, weight_bytes(model)
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    moved = read_bytes + batch * slot * (prompt + steps / 2)
    step = seconds / steps
    stats = jax.devices()[0].memory_stats() or {}
    analysis = {name: program.memory_analysis() for name, program in (("prefill", prefill), ("decode", decode))}
    row = {
        "batch": batch,
        "ms per step": step * 1e3,
        "tokens/s": batch / step,
        "ms to first token": first * 1e3,
        "tokens/s with prefill": batch * (1 + steps) / (first + seconds),
        "TB/s": moved / step / 1e12,
        "floor ms": moved / bandwidth * 1e3,
        "share of floor": moved / bandwidth / step,
        "weight bytes": all_bytes,
        "KV cache bytes": sum(leaf.nbytes for leaf in jax.tree.leaves((run.cache.keys, run.cache.values))),
        "temporary bytes": {name: a.temp_size_in_bytes for name, a in analysis.items()},
        "peak bytes so far": stats.get("peak_bytes_in_use"),
        "planned bytes": memory_plan(config, all_bytes, batch, prompt, new, scratch=is_compressed(model)).total,
        "seconds to compile": compiling,
        "tokens digest": int(np.bitwise_xor.reduce(tokens.astype(np.uint32).ravel() * np.uint32(2654435761))),
    }
    if split:
        row["us per step"] = profile(
            lambda r: decode(s.weights, s.inputs, r, np.int32(1 + s.static.look_every)), prefill, s
        )
    return row


def is_compressed(model: Decoder) -> bool:
    leaves = jax.tree.leaves(model.to_params(), is_leaf=lambda leaf: isinstance(leaf, CompressedTensor))
    return any(isinstance(leaf, CompressedTensor) for leaf in leaves)


def profile(decode, prefill, s) -> dict[str, float]:
    """Microseconds of kernels per step, by what they are for; and the longest, by name."""
    run = jax.block_until_ready(prefill(s.weights, s.inputs))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(decode(run))
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    parts = dict.fromkeys((*PARTS, "rest"), 0.0)
    names: dict[str, float] = {}
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                where = " ".join([event.name, *(str(v) for k, v in event.stats if k in ("tf_op", "name", "hlo_op"))])
                of = lambda part: any(p in where.lower() for p in PARTS[part])  # noqa: B023, E731
                part = next((part for part in ("attention", "matmul") if of(part)), "rest")
                parts[part] += event.duration_ns / 1e3 / s.static.look_every
                key = f"{part}: {event.name[:60]}"
                names[key] = names.get(key, 0.0) + event.duration_ns / 1e3 / s.static.look_every
    longest = sorted(names.items(), key=lambda item: -item[1])[:12]
    return {**parts, "longest": dict(longest)}


def layers_that_fit(config: DecoderConfig, batch: int, prompt: int, new: int, memory: int) -> int:
    """Most layers of which the dense model and its cache fit."""
    for layers in range(config.num_layers, 0, -1):
        smaller = with_layers(config, layers)
        leaves = jax.tree.leaves(family_of(config)(smaller).to_params())
        weights = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        if memory_plan(smaller, weights, batch, prompt, new, scratch=False).total <= ROOM * memory:
            return layers
    raise SystemExit("not one layer fits")


def bench_model(name: str, args, bandwidth: float, save) -> None:
    config = MODELS[name]
    stats = jax.devices()[0].memory_stats() or {"bytes_limit": 1 << 33}
    layers = args.layers or layers_that_fit(config, max(args.batches), args.prompt, args.new, stats["bytes_limit"])
    config = with_layers(config, min(layers, config.num_layers))
    about = {"layers": config.num_layers, "of": MODELS[name].num_layers, "note": NOTES.get(name, "")}
    # On the host, so that the device holds the model and no more.
    params, built = jax.device_get(dense_layer(config, args.weights)), {}
    rows = []
    for format in (*args.formats, DENSE):
        start = time.perf_counter()
        model = whole_model(config, params if format == DENSE else encode(params, format), not args.no_chain)
        jax.block_until_ready(jax.tree.leaves(model.to_params()))
        built[format] = time.perf_counter() - start
        for batch in args.batches:
            row = measure(model, batch, args.prompt, args.new, args.repeats, bandwidth, args.split)
            rows.append({"model": name, "weights": format, **row})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            save(name, {**about, "seconds to build": built}, rows)
        del model
        gc.collect()


def compare(rows: list[dict]) -> list[dict]:
    """Compressed against dense, batch by batch."""
    dense = {(r["model"], r["batch"]): r for r in rows if r["weights"] == DENSE}
    found = []
    for row in rows:
        other = dense.get((row["model"], row["batch"]))
        if row["weights"] != DENSE and other:
            found.append(
                {
                    "model": row["model"], "weights": row["weights"], "batch": row["batch"],
                    "ms": row["ms per step"], "dense ms": other["ms per step"],
                    "speedup": other["ms per step"] / row["ms per step"],
                    "tokens/s": row["tokens/s"],
                    "first token ms": row["ms to first token"], "dense first ms": other["ms to first token"],
                    "memory": row["weight bytes"] / other["weight bytes"], "of floor": row["share of floor"],
                    "dense of floor": other["share of floor"],
                }
            )  # fmt: skip
    return found


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Milliseconds a step against the batch, a panel a model, with the floor that the bytes set."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for panel, model in zip(panels[0], models):
        for weights in dict.fromkeys(row["weights"] for row in rows):
            found = sorted(
                (r for r in rows if (r["model"], r["weights"]) == (model, weights)), key=lambda r: r["batch"]
            )
            batches = [r["batch"] for r in found]
            (line,) = panel.plot(batches, [r["ms per step"] for r in found], marker="o", label=weights)
            floors = [r["floor ms"] for r in found]
            panel.plot(
                batches, floors, ":", color=line.get_color(), label=f"{weights}: its bytes at the speed of a copy"
            )
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_title(model)
        panel.set_xlabel("batch")
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("ms per decode step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b"], choices=MODELS)
    parser.add_argument("--formats", nargs="+", default=["lane-planar"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--layers", type=int, help="at most this many; default: as many as fit dense")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256, help="tokens; the first one is prefill's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", default="real", choices=synthetic.KINDS)
    parser.add_argument("--no-chain", action="store_true", help="decode a kernel at a time, see Execution.chain")
    parser.add_argument("--split", action="store_true", help="also profile a few steps")
    parser.add_argument("--name", default="generate_gpu", help="of the files under bench/results")
    parser.add_argument("--plot", metavar="JSON", help="only draw the plot of an earlier result")
    args = parser.parse_args()
    if args.plot:
        source = pathlib.Path(args.plot)
        content = json.loads(source.read_text())
        plot([row for model in content["models"].values() for row in model["rows"]], source.with_suffix(".png"))
        return
    bandwidth = copy_bandwidth()
    models: dict[str, dict] = {}

    def save(name, about, rows):
        models[name] = {**about, "rows": rows}
        harness.write_result(
            args.name,
            {
                "setup": {
                    "weights": synthetic.ABOUT[args.weights] + "; every layer a copy of the first",
                    "prompt": args.prompt,
                    "new tokens": args.new,
                    "dense": "the same model with bf16 weights through XLA, the same loop and attention, same run",
                    "ms per step": "median wall time of the decode loop over its steps, greedy, no row ends",
                    "first token": "prefill of the whole batch and the first token",
                    "floor": "weights read and the mean length of the cache, over the bandwidth of a copy",
                    "copy bandwidth TB/s": bandwidth / 1e12,
                    "repeats": args.repeats,
                    "chain": not args.no_chain,
                },
                "models": models,
                "compared": compare([row for model in models.values() for row in model["rows"]]),
            },
        )

    for name in args.models:
        bench_model(name, args, bandwidth, save)
    rows = [row for model in models.values() for row in model["rows"]]
    if compared := compare(rows):
        harness.show(f"decode, {jax.devices()[0].device_kind}", compared)
    plot(rows, harness.RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
