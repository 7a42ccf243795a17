"""The grouped fused matmul of mixtures of experts, against XLA's ``ragged_dot`` on dense weights, in the same run.

A jitted program multiplies again and again, each time routed otherwise, so that a step's experts are not in the cache.
XLA runs it as CUDA graphs; calls of it queue up, so that the wall time of many is the device's.
"""

from __future__ import annotations

import argparse
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import synthetic
from kernels import calls_of, copy_bandwidth

import jaxzip
from jaxzip.tuning import median_us

#: Experts, experts of a token, K, M: gate and up as one weight, then down.
SHAPES = {
    "Qwen3-30B-A3B gate_up": (128, 8, 2048, 1536),
    "Qwen3-30B-A3B down": (128, 8, 768, 2048),
    "Mixtral-8x7B gate_up": (8, 2, 4096, 28672),
    "Mixtral-8x7B down": (8, 2, 14336, 4096),
}
BATCHES = (1, 8, 32, 128)
LAUNCHES = 16  # of a program, each with a routing of its own


def routings(experts: int, top: int, batch: int) -> np.ndarray:
    """int32 ``[LAUNCHES, experts]``: rows of each expert when every token takes ``top`` experts by chance.

    Of one token they follow on those of the launch before, so that all are used once before one is used again.
    """
    rng = np.random.default_rng(batch)
    sizes = np.zeros((LAUNCHES, experts), np.int32)
    for launch in range(LAUNCHES):
        for _ in range(batch):
            chosen = rng.choice(experts, top, replace=False)
            if batch == 1:
                chosen = (np.arange(top) + launch * top) % experts
            sizes[launch, chosen] += 1
    return sizes


def program(multiply):
    """``(x, stack, routings) -> products``, each behind the one before; an array a routing, as a slice is a launch."""

    def run(x, stack, sizes):
        results = []
        for i in range(LAUNCHES):
            x, y = jax.lax.optimization_barrier((x, multiply(x, stack, sizes[i])))
            results.append(y)
        return results

    return jax.jit(run)


def stack_of(expert, experts: int):
    """The expert so many times, in memory of their own."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], experts, 0), expert)


def measure(name: str, kind: str, batches: list[int], repeats: int, bandwidth: float) -> list[dict]:
    experts, top, k, m = SHAPES[name]
    w = synthetic.weights(kind, (k, m))
    z = jaxzip.compress(w, format="lane-planar")
    stacks = {"fused": stack_of(z, experts), "dense": stack_of(w, experts)}
    multiply = {
        "fused": functools.partial(jaxzip.ragged_matmul, implementation="ffi"),
        "dense": functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.bfloat16),
    }
    found = []
    for batch in batches:
        sizes = routings(experts, top, batch)
        x = jax.random.normal(jax.random.key(batch), (batch * top, k), jnp.bfloat16)
        active = float(np.mean(np.count_nonzero(sizes, axis=1)))
        floor = {"fused": active * z.nbytes / bandwidth * 1e6, "dense": active * w.nbytes / bandwidth * 1e6}
        us = {}
        for kernel, run in multiply.items():
            arguments = (x, stacks[kernel], [jnp.asarray(launch) for launch in sizes])
            compiled = program(run).lower(*arguments).compile()
            us[kernel] = median_us(compiled, arguments, LAUNCHES, repeats, calls_of(LAUNCHES, floor["dense"]))
        if us["fused"] < floor["fused"] / 2:
            raise RuntimeError(f"{name}, batch {batch}: {us} us, memory alone takes {floor}: XLA dropped products")
        found.append(
            {"weight": name, "batch": batch, "rows": batch * top, "active experts": active, "bits": z.bits_per_weight}
            | {"us": us["fused"], "floor us": floor["fused"], "share of floor": floor["fused"] / us["fused"]}
            | {"ragged_dot us": us["dense"], "ratio": us["dense"] / us["fused"], "dense floor us": floor["dense"]}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="tokens")
    parser.add_argument("--weights", default="real", choices=synthetic.KINDS)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no NVIDIA GPU: this is a GPU kernel")
    bandwidth = copy_bandwidth()
    rows: list[dict] = []
    for name in SHAPES:
        rows += measure(name, args.weights, args.batch, args.repeats, bandwidth)
        content = {
            "setup": {
                "weights": synthetic.ABOUT[args.weights],
                "times": "us a launch: wall time of queued calls of a jitted program over their launches, median",
                "ragged_dot": "jax.lax.ragged_dot(x, w[E, K, M], sizes) in bf16 by XLA, same run",
                "copy bandwidth TB/s": bandwidth / 1e12,
                "floor": "bytes of the experts that have rows over the copy bandwidth; dense floor: of bf16 weights",
                "launches": LAUNCHES,
            },
            "rows": rows,
        }
        path = harness.write_result("ragged", content)
    harness.show(f"rows by expert times [E, K, M], {jax.devices()[0].device_kind}", rows)
    print(path)


if __name__ == "__main__":
    main()
