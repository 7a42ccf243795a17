"""Conversion, verification and restoration of a checkpoint of 4 GB: seconds, megabytes a second, peak resident memory.

    python bench/conversion.py                      # a synthetic Orbax checkpoint, made and deleted again
    python bench/conversion.py --source DIR         # a checkpoint of your own

Each step runs in a process of its own, so that its peak is its own. The bound is 3 times the largest tensor + 400 MB.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

LAYERS, SHAPE, TABLE = 26, (4096, 14336), (128256, 4096)
STEPS = ("convert", "verify", "verify_checksums", "restore")
MEASURE = """
import json, resource, sys, time
from jaxzip import checkpoint
start = time.perf_counter()
result = getattr(checkpoint, sys.argv[1])(*sys.argv[2:])
seconds = time.perf_counter() - start
assert result is None or not hasattr(result, "identical") or result.identical, result
print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def weights(shape: tuple[int, int], seed: int):
    """bf16 weights with Gaussian exponents and random signs and mantissas: cheap to make, as hard to "
    "compress as real ones."""
    import ml_dtypes
    import numpy as np

    rng = np.random.default_rng(seed)
    out = np.empty(shape, np.uint16)
    exponents = (rng.standard_normal(1 << 22, np.float32) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint16)
    flat = out.reshape(-1)
    for start in range(0, flat.size, exponents.size):
        part = flat[start : start + exponents.size]
        part[:] = exponents[: part.size] ^ (rng.integers(0, 1 << 16, part.size, np.uint16) & 0x807F)
    return out.view(ml_dtypes.bfloat16)


def make(path: str, table: bool) -> None:
    """Saves a model's worth of layers, and with ``table`` an embedding of 1 GB, with Orbax itself."""
    import orbax.checkpoint as ocp

    layers = LAYERS if table else 36
    tree = {"layers": {str(i): {"mlp": {"up_proj": {"kernel": weights(SHAPE, i)}}} for i in range(layers)}}
    if table:
        tree["embedder"] = {"embedding": weights(TABLE, LAYERS)}
    ocp.PyTreeCheckpointer().save(path, tree)


def measure(source: pathlib.Path, folder: pathlib.Path, label: str, steps: tuple[str, ...]) -> list[dict]:
    """Runs the steps on ``source``; returns a row for each."""
    rows, dst = [], folder / "compressed"
    arguments = {
        "convert": (source, dst),
        "verify": (source, dst),
        "verify_checksums": (dst,),
        "restore": (dst, folder / "restored"),
    }
    for step in steps:
        command = [sys.executable, "-W", "ignore", "-c", MEASURE, step, *arguments[step]]
        result = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        if step == "convert":
            from jaxzip import checkpoint

            info = checkpoint.inspect(dst)
            total = info["total"]
            largest = max(row["original_bytes"] for row in info["tensors"])
        rows.append(
            {
                "source": label,
                "step": step,
                "GB": total["original_bytes"] / 1e9,
                "seconds": result["seconds"],
                "MB/s": total["original_bytes"] / 1e6 / result["seconds"],
                "largest tensor MB": largest / 1e6,
                "peak MB": result["peak_bytes"] / 1e6,
                "bound MB": 3 * largest / 1e6 + 400,
                "ratio": total["ratio"],
            }
        )
    return rows


def main() -> None:
    import harness

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, help="instead of the synthetic checkpoints")
    parser.add_argument("--folder", type=pathlib.Path, help="where to work; needs 12 GB")
    parser.add_argument("--name", default="conversion", help="of the file under bench/results")
    parser.add_argument("--make", nargs=2, metavar=("PATH", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make[0], args.make[1] == "table")
        return
    rows = []
    # The small one first: there the fixed 400 MB matter; the one with a table has a tensor of 1 GB.
    for kind in ("layers", "table") if args.source is None else ("own",):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            source = args.source or pathlib.Path(folder) / "source"
            if args.source is None:
                subprocess.run([sys.executable, "-W", "ignore", __file__, "--make", source, kind], check=True)
            steps = ("convert",) if kind == "table" else STEPS
            rows += measure(source, pathlib.Path(folder), args.source.name if args.source else kind, steps)
    harness.show("conversion", rows)
    print(harness.write_result(args.name, {"rows": rows}))
    failed = [row for row in rows if row["step"] == "convert" and row["peak MB"] > row["bound MB"]]
    if failed:
        sys.exit(f"over the memory bound: {failed}")


if __name__ == "__main__":
    main()
