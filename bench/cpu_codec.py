"""Encode, decode and check on the CPU: gigabytes of bf16 a second, for both memory orders of the weight."""

from __future__ import annotations

import argparse

import harness
import jaxzip.ffi
import numpy as np

from jaxzip.testing import gaussian_weights

SIGMA, ZEROS = 0.02, 0.0005


def measure(m: int, k: int, threads: int, repeats: int) -> list[dict]:
    cpu = jaxzip.ffi.cpu_module()
    rows = []
    bits = gaussian_weights((m, k), sigma=SIGMA, zeros=ZEROS, seed=0).view(np.uint16)
    for order, weights in (("[M, K]", np.ascontiguousarray(bits)), ("[K, M]", np.asfortranarray(bits))):
        payload = cpu.encode_tca_tbe(weights)
        out = np.empty_like(weights)
        times = harness.time_paired(
            {
                "encode": lambda i: cpu.encode_tca_tbe(weights, num_threads=threads),
                "decode": lambda i: cpu.decode_tca_tbe(**payload, out=out, num_threads=threads),
                "check": lambda i: cpu.check_tca_tbe(**payload, m=m, k=k, num_threads=threads),
            },
            repeats=repeats,
        )
        np.testing.assert_array_equal(out, weights)
        size = sum(array.nbytes for array in payload.values())
        for name, t in times.items():
            rows.append(
                {
                    "operation": name,
                    "M": m,
                    "K": k,
                    "order": order,
                    "isa": cpu.isa(),
                    "threads": threads,
                    "median ms": t["median_ms"],
                    "min ms": t["min_ms"],
                    "GB/s (median)": weights.nbytes / t["median_ms"] / 1e6,
                    "GB/s (best)": weights.nbytes / t["min_ms"] / 1e6,
                    "bits/weight": size * 8 / weights.size,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--name", default="cpu_codec", help="of the file under bench/results")
    args = parser.parse_args()
    cpu = jaxzip.ffi.cpu_module()
    rows = [row for threads in (1, 2) for row in measure(args.m, args.k, threads, args.repeats)]
    for level in cpu.isa_levels()[:-1]:
        cpu.set_isa(level)
        rows += measure(args.m // 4, args.k, 1, max(3, args.repeats // 3))
    cpu.set_isa("")
    setup = {"weights": f"Gaussian, sigma {SIGMA}, {ZEROS:.2%} zeros, seed 0", "rate": "bytes of bf16 / time"}
    harness.show("TCA-TBE codec on the CPU", rows)
    print(harness.write_result(args.name, {"setup": setup, "rows": rows}))


if __name__ == "__main__":
    main()
