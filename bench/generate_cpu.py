"""Tokens per second of SmolLM2-135M on this CPU: dense through XLA, dense and compressed through the fused kernel.

What ``make demo`` shows, as JSON with commit and machine. Takes the compressed checkpoint that the demo made.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
from harness import write_result
from jaxzip.ffi import cpu_module

from jaxzip.cli.demo import MODEL, PROMPT, generate_all

TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", type=pathlib.Path, nargs="?", default="demo/smollm2-135m-instruct-jaxzip")
    parser.add_argument("--name", default="generate_cpu", help="of the file under bench/results")
    args = parser.parse_args()
    runs = generate_all(args.ckpt, PROMPT, TOKENS)
    control = runs[1].logits.view(np.uint32)
    rows = [
        {
            "weights": r.name,
            "matmul": r.kernel,
            "weight_bytes": r.weight_bytes,
            "tokens_per_second": r.tokens_per_second,
            "logits_equal_control": bool(np.array_equal(r.logits.view(np.uint32), control)),
        }
        for r in runs
    ]
    for row in rows:
        print(row)
    setup = {"model": MODEL, "batch": 1, "new_tokens": TOKENS, "sampling": "greedy", "isa": cpu_module().isa()}
    write_result(args.name, setup | {"runs": rows})


if __name__ == "__main__":
    main()
