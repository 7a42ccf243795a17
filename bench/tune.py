"""Fills the table of measurements that comes with the package: ``jaxzip tune`` for shapes instead of a checkpoint.

Writes the table of this device to ``--out`` after every shape, in the form of ``jaxzip/ops/measurements``.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

import harness
import jax
import synthetic
from kernels import SHAPES

import jaxzip
from jaxzip import tuning

NOTE = "us a product of synthetic weights with the exponents of real models, bench/tune.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file of the table")
    parser.add_argument("--shapes", nargs="+", default=[f"{m}x{k}" for m, k in SHAPES], help="MxK, output x input")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--format", default="lane-planar")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no NVIDIA GPU")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["JAXZIP_CACHE_DIR"] = directory
        for shape in args.shapes:
            start = time.perf_counter()
            m, k = (int(side) for side in shape.split("x"))
            w = jaxzip.compress(synthetic.weights("real", (k, m)), format=args.format)
            for found in tuning.tune(w, args.n):
                us = ", ".join(f"{name} {us:.2f}" for name, us in sorted(found.us.items(), key=lambda item: item[1]))
                print(f"{shape} N={found.rows}: {us} {found.configs or ''}", flush=True)
            table = json.loads(tuning.cache_file().read_text())
            about = harness.environment()
            table["note"] = f"{NOTE}, commit {about['commit']}, jax {jax.__version__}"
            args.out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            print(f"{shape}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
