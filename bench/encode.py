"""Encoding to lane-planar on the GPU that holds the weight, in GB/s of bf16: CUDA kernels, XLA's array programs."""

from __future__ import annotations

import argparse
import statistics
import time

import harness
import jax
import synthetic

from jaxzip.ops.encode import encode_on_device

IMPLEMENTATIONS = ("ffi", "xla")


def measure(shape: tuple[int, int], kind: str, implementation: str, repeats: int) -> dict:
    m, k = shape
    w = synthetic.weights(kind, (k, m))
    times = []
    for _ in range(repeats + 1):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(encode_on_device(w, implementation=implementation))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    return {"M": m, "K": k, "by": implementation, "ms": seconds * 1e3, "GB/s of bf16": w.nbytes / seconds / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["28672x4096", "4096x4096"], help="MxK, output x input")
    parser.add_argument("--weights", default="gaussian", choices=synthetic.KINDS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="encode_h200", help="of the file under bench/results")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no NVIDIA GPU; bench/cpu_codec.py measures the host's encoders")
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in args.shapes]
    rows = [measure(shape, args.weights, by, args.repeats) for shape in shapes for by in IMPLEMENTATIONS]
    what = "encode_on_device, lane-planar, w [K, M] on the GPU, wall time with its looks at the host, median"
    path = harness.write_result(
        args.name, {"setup": {"weights": synthetic.ABOUT[args.weights], "what": what}, "rows": rows}
    )
    harness.show("encode", rows)
    print(path)


if __name__ == "__main__":
    main()
