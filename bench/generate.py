"""Milliseconds a step and to the first token of whole models on a GPU, dense and compressed through the same loop.

Models have the shapes of released ones and synthetic weights, see ``generate_models.py``. What is measured is
``generate``'s own programs: prefill with the first token, and the decode loop, whose cache is donated. Decoding begins
with a cache of random numbers, so that batches whose prefill is not asked for need no program for it. Results are
written after every batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import json
import pathlib
import statistics
import time

import device_time
import harness
import jax
import jax.numpy as jnp
import numpy as np
import synthetic
from generate_models import (
    MODELS,
    NOTES,
    dense_layer,
    encode,
    format_of,
    layers_that_fit,
    weight_bytes,
    whole_model,
    with_layers,
)
from generate_report import DENSE, all_rows, compare, compare_prefill, plot
from jaxzip.models import GREEDY
from jaxzip.models.decoder import Decoder
from jaxzip.models.memory_plan import memory_plan

loop = importlib.import_module("jaxzip.models.generate")

#: A way to compute that may be timed in turns with the model as it is, ``""``.
WITHOUT_CHAIN = "without chain"
#: New tokens for which a prefill that is timed makes room.
FEW = 8
#: Least number of times that a prefill is timed: it is short.
PREFILLS = 5
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
        "decode_layer",
    ),
    "attention": ("attend", "attention"),
}


def copy_bandwidth() -> float:
    """Bytes read and written a second by XLA's copies of 1 GiB, one at a time: peak memory is to be the model's."""
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


def setups(model: Decoder, variants: tuple[str, ...], batch: int, prompt: int, new: int) -> dict[str, object]:
    """What programs are compiled for, by variant; ``""`` is the model as it is. All share its weights."""
    tokens = np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    found, chain = {}, model.chain
    for variant in ("", *variants):
        model.chain = chain and variant != WITHOUT_CHAIN
        found[variant] = loop._Setup.of(model, tokens, new, GREEDY, None, (), 0)
    model.chain = chain
    return found


def compiled(lower) -> tuple[object, float]:
    """A program, and the seconds that it took to trace and compile."""
    start = time.perf_counter()
    return lower().compile(), time.perf_counter() - start


def prefill_program(s):
    return compiled(lambda: loop._start.lower(s.static, False, s.weights, s.inputs))


def decode_program(s, shapes):
    until = jax.ShapeDtypeStruct((), jnp.int32)
    return compiled(lambda: loop._advance.lower(s.static, s.weights, s.inputs, shapes, until, s.static.look_every))


def state(s):
    """Shapes of the loop's state."""
    return jax.eval_shape(lambda w, i: loop._prefill(s.static, False, w, i), s.weights, s.inputs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def begin(s, shapes):
    """The loop's state behind a prefill, with random keys and values."""
    batch, width = s.inputs["tokens"].shape
    keys, values = (
        tuple(_noise(2 * i + odd, leaf.shape, leaf.dtype) for i, leaf in enumerate(shapes.cache.keys)) for odd in (0, 1)
    )
    start, end = jnp.array(s.inputs["start"]), jnp.array(width, jnp.int32)
    cache = dataclasses.replace(shapes.cache, keys=keys, values=values, start=start, end=end)
    last, one = jnp.array(s.inputs["tokens"][:, -1]), jnp.array(1, jnp.int32)
    found = dataclasses.replace(shapes, cache=cache, last=last, step=one, lengths=jnp.ones(batch, jnp.int32))
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    return jax.block_until_ready(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if is_shape(leaf) else leaf, found)
    )


def measure_decode(model: Decoder, variants, batch: int, args, bandwidth: float) -> list[dict]:
    """A row for the model as it is, and one for each variant, timed in turns."""
    prompt, new, config = args.prompts[0], args.new, model.config
    all_setups = setups(model, variants, batch, prompt, new)
    shapes = state(all_setups[""])
    programs = {variant: decode_program(s, shapes) for variant, s in all_setups.items()}
    look_every = all_setups[""].static.look_every
    steps = -(-(new - 1) // look_every) * look_every
    seconds: dict[str, list[float]] = {variant: [] for variant in programs}
    tokens: dict[str, np.ndarray] = {}
    for _ in range(args.repeats + 1):  # the first one warms up
        for variant, (decode, _) in programs.items():
            s, run = all_setups[variant], None  # one cache at a time
            run = begin(s, shapes)
            start = time.perf_counter()
            run = jax.block_until_ready(decode(s.weights, s.inputs, run, np.int32(1 + steps)))
            seconds[variant].append(time.perf_counter() - start)
            found = np.asarray(run.tokens)[:, :new]
            assert variant not in tokens or np.array_equal(tokens[variant], found), "two runs gave different tokens"
            tokens[variant] = found
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((run.cache.keys, run.cache.values)))
    del run
    all_bytes, read_bytes = weight_bytes(model)
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    moved = read_bytes + batch * slot * (prompt + steps / 2)
    rows = []
    for variant, (decode, compiling) in programs.items():
        step = statistics.median(seconds[variant][1:]) / steps
        row = {
            "batch": batch,
            "variant": variant,
            "ms per step": step * 1e3,
            "ms per step, all": [1e3 * s / steps for s in seconds[variant][1:]],
            "tokens/s": batch / step,
            "TB/s": moved / step / 1e12,
            "floor ms": moved / bandwidth * 1e3,
            "share of floor": moved / bandwidth / step,
            "weight bytes": all_bytes,
            "KV cache bytes": cache_bytes,
            "temporary bytes": decode.memory_analysis().temp_size_in_bytes,
            "peak bytes so far": peak_bytes(),
            "seconds to compile": compiling,
            "tokens digest": digest(tokens[variant]),
        }  # fmt: skip
        if args.split:
            row["us per step"] = profile(decode, all_setups[variant], shapes)
        rows.append(row)
    return rows


def digest(tokens: np.ndarray) -> int:
    return int(np.bitwise_xor.reduce(tokens.astype(np.uint32).ravel() * np.uint32(2654435761)))


def measure_prefill(model: Decoder, batch: int, prompt: int, repeats: int) -> dict:
    """Milliseconds to the first token."""
    (setup,) = setups(model, (), batch, prompt, FEW).values()
    prefill, compiling = prefill_program(setup)
    seconds = []
    for _ in range(max(repeats, PREFILLS) + 1):
        start = time.perf_counter()
        jax.block_until_ready(prefill(setup.weights, setup.inputs))
        seconds.append(time.perf_counter() - start)
    return {
        "batch": batch,
        "prompt": prompt,
        "variant": "",
        "ms to first token": statistics.median(seconds[1:]) * 1e3,
        "temporary bytes": prefill.memory_analysis().temp_size_in_bytes,
        "peak bytes so far": peak_bytes(),
        "planned bytes": memory_plan(
            model.config, weight_bytes(model)[0], batch, prompt, FEW, format=format_of(model)
        ).total,
        "seconds to compile": compiling,
    }


def peak_bytes() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def profile(decode, s, shapes) -> dict[str, float]:
    """Microseconds a step in which kernels ran, by what they are for; and those of the longest, by name."""
    run, until = begin(s, shapes), np.int32(1 + s.static.look_every)
    by_part: dict[str, list] = {part: [] for part in (*PARTS, "rest")}
    by_name: dict[str, list] = {}
    for kernel in device_time.kernels(lambda: decode(s.weights, s.inputs, run, until)):
        where = f"{kernel.name} {kernel.of}".lower()
        part = next((part for part in ("attention", "matmul") if any(p in where for p in PARTS[part])), "rest")
        by_part[part].append(kernel)
        by_name.setdefault(f"{part}: {kernel.name[:60]}", []).append(kernel)

    def a_step(found):
        return {key: device_time.busy_us(kernels) / s.static.look_every for key, kernels in found.items()}

    longest = sorted(a_step(by_name).items(), key=lambda item: -item[1])[:12]
    return {**a_step(by_part), "longest": dict(longest)}


def bench_model(name: str, args, bandwidth: float, save) -> None:
    config = MODELS[name]
    memory = (jax.devices()[0].memory_stats() or {"bytes_limit": 1 << 33})["bytes_limit"]
    needs = [(max(args.batches, default=1), args.prompts[0], args.new)]
    needs += [(max(args.prefill_batches), max(args.prompts), FEW)] if args.prefill_batches else []
    layers = args.layers or min(layers_that_fit(config, *need, memory) for need in needs)
    config = with_layers(config, min(layers, config.num_layers))
    start = time.perf_counter()
    # On the host, so that the device holds the model and no more.
    params = jax.device_get(dense_layer(config, args.weights))
    took = {"weights": time.perf_counter() - start}
    note = "as many layers as were asked for" if args.layers else NOTES.get(name, "")
    about = {"layers": config.num_layers, "of": MODELS[name].num_layers, "note": note, "seconds": took}
    decoding, prefills = [], []

    def add(rows: list[dict], format: str, found: list[dict]) -> None:
        for row in found:
            rows.append({"model": name, "weights": format, **row})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        took[format] = time.perf_counter() - start
        save(name, {**about, "rows": decoding, "prefill": prefills})

    for format in (*args.formats, DENSE):
        start = time.perf_counter()
        model = whole_model(config, params if format == DENSE else encode(params, format), not args.no_chain)
        jax.block_until_ready(jax.tree.leaves(model.to_params()))
        took[f"{format}, built"] = time.perf_counter() - start
        variants = (WITHOUT_CHAIN,) if args.also_without_chain and format != DENSE else ()
        for batch in args.batches:
            add(decoding, format, measure_decode(model, variants, batch, args, bandwidth))
        for prompt in args.prompts:
            for batch in args.prefill_batches:
                add(prefills, format, [measure_prefill(model, batch, prompt, args.repeats)])
        del model
        gc.collect()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b"], choices=MODELS)
    parser.add_argument("--formats", nargs="+", default=["lane-planar"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 64], help="of decoding; none: no decoding")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512], help="tokens; decoding follows the first one")
    parser.add_argument("--prefill-batches", type=int, nargs="*", default=[1], help="of which first tokens are timed")
    parser.add_argument("--also-without-chain", action="store_true", help="times decoding without it, in turns")
    parser.add_argument("--layers", type=int, help="at most this many; default: as many as fit dense")
    parser.add_argument("--new", type=int, default=256, help="tokens; the first one is prefill's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", default="real", choices=synthetic.KINDS)
    parser.add_argument("--no-chain", action="store_true", help="decode a kernel at a time, see Execution.chain")
    parser.add_argument("--split", action="store_true", help="also profile a few steps")
    parser.add_argument("--name", default="generate_gpu", help="of the files under bench/results")
    parser.add_argument("--plot", metavar="JSON", help="only draw the plot of an earlier result")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.plot:
        source = pathlib.Path(args.plot)
        plot(json.loads(source.read_text())["models"], source.with_suffix(".png"))
        return
    bandwidth = copy_bandwidth()
    models: dict[str, dict] = {}

    def save(name, content):
        models[name] = content
        harness.write_result(
            args.name,
            {
                "setup": {
                    "weights": synthetic.ABOUT[args.weights] + "; every layer a copy of the first",
                    "prompts": args.prompts,
                    "new tokens": args.new,
                    "dense": "the same model with bf16 weights through XLA, the same loop and attention, same run",
                    "ms per step": "median wall time of the decode loop over its steps, greedy, no row ends, after "
                    "the first of the prompts, from a cache of random numbers",
                    "first token": "prefill of the whole batch and the first token",
                    "floor": "weights read and the mean length of the cache, over the bandwidth of a copy",
                    "copy bandwidth TB/s": bandwidth / 1e12,
                    "repeats": args.repeats,
                    "chain": not args.no_chain,
                },
                "models": models,
                "compared": compare(all_rows(models)),
                "prefill compared": compare_prefill(all_rows(models, "prefill")),
            },
        )

    for name in args.models:
        bench_model(name, args, bandwidth, save)
    device = jax.devices()[0].device_kind
    for title, found in (
        (f"decode, {device}", compare(all_rows(models))),
        (f"first token, {device}", compare_prefill(all_rows(models, "prefill"))),
    ):
        if found:
            harness.show(title, found)
    if all_rows(models):
        plot(models, harness.RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
