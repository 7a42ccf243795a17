"""Encode, decode, check and transcode on the CPU: gigabytes of bf16 a second, for both formats and memory orders.

Transcoding is between TCA-TBE and lane-planar; its memory is measured on a larger matrix, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import harness
import jaxzip.ffi
import numpy as np

from jaxzip.testing import gaussian_weights

SIGMA, ZEROS = 0.02, 0.0005
FORMATS = {"tca-tbe": "tca_tbe", "lane-planar": "lane_planar"}
#: Peak memory of transcoding a matrix [M, K], beyond the payload that goes in: what comes out, and scratch.
MEMORY = """
import json, resource, sys
import jaxzip.ffi
import numpy as np
source, target, m, k = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cpu = jaxzip.ffi.cpu_module()
tile = np.random.default_rng(0).standard_normal((64, k), np.float32) * 0.02
tile = (tile.view(np.uint32) >> 16).astype(np.uint16)
weights = np.broadcast_to(tile, (m // 64, 64, k)).reshape(m, k)
payload = getattr(cpu, f"encode_{source}")(weights)
del weights
def resident():
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")}
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts anew
before = resident()["VmRSS"]
result = getattr(cpu, f"{source}_to_{target}")(**payload, m=m, k=k)
extra = resident()["VmHWM"] - before
print(json.dumps({"extra": extra, "result": sum(a.nbytes for a in result.values()), "dense": 2 * m * k}))
"""


def measure(m: int, k: int, threads: int, repeats: int) -> list[dict]:
    cpu = jaxzip.ffi.cpu_module()
    rows = []
    bits = gaussian_weights((m, k), sigma=SIGMA, zeros=ZEROS, seed=0).view(np.uint16)

    def aligned() -> np.ndarray:  # as XLA's buffers are
        raw = np.empty(m * k + 32, np.uint16)
        start = -raw.ctypes.data % 64 // 2
        return raw[start : start + m * k]

    for order, weights in (("[M, K]", np.ascontiguousarray(bits)), ("[K, M]", np.asfortranarray(bits))):
        out = aligned().reshape((m, k) if order == "[M, K]" else (k, m))
        out = out if order == "[M, K]" else out.T
        functions, sizes = {}, {}
        for name, symbol in FORMATS.items():
            encode, decode, check = (getattr(cpu, f"{verb}_{symbol}") for verb in ("encode", "decode", "check"))
            payload = encode(weights)
            decode(**payload, out=out)
            np.testing.assert_array_equal(out, weights)
            sizes[name] = sum(array.nbytes for array in payload.values())
            functions |= {
                (name, "encode"): lambda i, f=encode: f(weights, num_threads=threads),
                (name, "decode"): lambda i, f=decode, p=payload: f(**p, out=out, num_threads=threads),
                (name, "check"): lambda i, f=check, p=payload: f(**p, m=m, k=k, num_threads=threads),
            }
            if order == "[M, K]":  # transcoding knows no order
                other = next(s for s in FORMATS.values() if s != symbol)
                transcode = getattr(cpu, f"{symbol}_to_{other}")
                functions[name, f"to {other.replace('_', '-')}"] = lambda i, f=transcode, p=payload: f(
                    **p, m=m, k=k, num_threads=threads
                )
        for (name, operation), t in harness.time_paired(functions, repeats=repeats).items():
            rows.append(
                {
                    "format": name,
                    "operation": operation,
                    "M": m,
                    "K": k,
                    "order": order if operation in ("encode", "decode", "check") else "",
                    "isa": cpu.isa(),
                    "threads": threads,
                    "median ms": t["median_ms"],
                    "min ms": t["min_ms"],
                    "GB/s (median)": weights.nbytes / t["median_ms"] / 1e6,
                    "GB/s (best)": weights.nbytes / t["min_ms"] / 1e6,
                    "bits/weight": sizes[name] * 8 / weights.size,
                }
            )
    return rows


def transcoding_memory(m: int, k: int) -> list[dict]:
    rows = []
    for source, target in (("tca_tbe", "lane_planar"), ("lane_planar", "tca_tbe")):
        command = [sys.executable, "-c", MEMORY, source, target, str(m), str(k)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append(
            {
                "from": source.replace("_", "-"),
                "to": target.replace("_", "-"),
                "M": m,
                "K": k,
                "dense MB": found["dense"] / 1e6,
                "result MB": found["result"] / 1e6,
                "scratch MB": (found["extra"] - found["result"]) / 1e6,
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
    memory = transcoding_memory(4 * args.m, args.k)
    setup = {
        "weights": f"Gaussian, sigma {SIGMA}, {ZEROS:.2%} zeros, seed 0",
        "rate": "bytes of bf16 / time",
        "scratch": "peak resident memory while transcoding, less what was there before and the result",
    }
    harness.show("codecs on the CPU", rows)
    harness.show("memory of transcoding", memory)
    print(harness.write_result(args.name, {"setup": setup, "rows": rows, "transcoding memory": memory}))


if __name__ == "__main__":
    main()
