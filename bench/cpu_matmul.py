"""The fused matrix product on compressed weights against XLA's own bf16 dot, with weights that are not in cache."""

from __future__ import annotations

import argparse

import harness
import jax
import jax.numpy as jnp
import jaxzip.ffi
import numpy as np
from jaxzip.ffi.format_ops import TCA_TBE

from jaxzip.testing import gaussian_weights

SIGMA, ZEROS = 0.02, 0.0005
COLD_BYTES = 100e6
SHAPES = ((4096, 4096), (4096, 14336))  # W[K, M]


def measure(k: int, m: int, batch_sizes: list[int], repeats: int) -> list[dict]:
    cpu = jaxzip.ffi.cpu_module()
    payloads, kernels, transposed, size = [], [], [], 0
    while not payloads or size * len(payloads) < COLD_BYTES:
        w = gaussian_weights((m, k), sigma=SIGMA, zeros=ZEROS, seed=len(payloads))
        payload = cpu.encode_tca_tbe(w.view(np.uint16))
        size = sum(array.nbytes for array in payload.values())
        payloads.append({name: jnp.array(array) for name, array in payload.items()})
        kernels.append(jnp.array(np.ascontiguousarray(w.T)))
        transposed.append(jnp.array(w))
    copies = len(payloads)

    fused = jax.jit(lambda x, p: TCA_TBE.matmul(x, p, m, k))
    dot_km = jax.jit(lambda x, w: x @ w)
    dot_mk = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
    rows = []
    for n in batch_sizes:
        x = jnp.asarray(np.random.default_rng(n).standard_normal((n, k)), jnp.bfloat16)
        times = harness.time_paired(
            {
                "fused": lambda i: fused(x, payloads[i % copies]).block_until_ready(),
                "xla [K, M]": lambda i: dot_km(x, kernels[i % copies]).block_until_ready(),
                "xla [M, K]": lambda i: dot_mk(x, transposed[i % copies]).block_until_ready(),
            },
            repeats=repeats,
        )
        best_xla = min(times["xla [K, M]"]["median_ms"], times["xla [M, K]"]["median_ms"])
        rows.append(
            {"K": k, "M": m, "N": n, "isa": cpu.isa()}
            | {f"{name} {stat}": t[f"{stat}_ms"] for name, t in times.items() for stat in ("median", "min")}
            | {"speedup (median)": best_xla / times["fused"]["median_ms"]}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--name", default=f"cpu_matmul_jax{jax.__version__}", help="of the file under bench/results")
    args = parser.parse_args()
    rows = [row for k, m in SHAPES for row in measure(k, m, args.n, args.repeats)]
    setup = {
        "weights": f"Gaussian, sigma {SIGMA}, {ZEROS:.2%} zeros, seed 0..",
        "x": "bf16",
        "y": "bf16",
        "cold": f"copies of the weight of {COLD_BYTES / 1e6:.0f} MB or more in all, in turns",
        "times": "ms",
    }
    harness.show(f"y[N, M] = x[N, K] @ W on the CPU, jax {jax.__version__}, milliseconds", rows)
    print(harness.write_result(args.name, {"setup": setup, "rows": rows}))


if __name__ == "__main__":
    main()
