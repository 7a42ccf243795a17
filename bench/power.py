"""Time, SM clock and power of a whole model under steady load, of decoding and of prompts, dense and compressed.

Each program of ``generate`` runs again and again for some seconds, dense and compressed in turns, while ``nvidia-smi``
samples the GPU. The first part of each turn, in which clock and power settle, does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import generate
import harness
import jax
import jax.numpy as jnp
import numpy as np
from generate_models import MODELS, dense_layer, encode, whole_model, with_layers
from generate_report import DENSE

QUERY = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.sw_power_cap")
SAMPLE_MS = 100
#: Share of a turn after which clock and power count.
SETTLED = 0.4


@dataclasses.dataclass(frozen=True)
class Sample:
    at: float  # time.perf_counter()
    clock_mhz: float
    watts: float
    celsius: float
    capped: bool


@contextlib.contextmanager
def sampled() -> Iterator[list[Sample]]:
    """Samples of the GPU that JAX uses first while the block runs."""
    command = [
        "nvidia-smi",
        "-i",
        os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        f"--query-gpu={','.join(QUERY)}",
        "--format=csv,noheader,nounits",
        f"-lms={SAMPLE_MS}",
    ]
    samples: list[Sample] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            for line in process.stdout:
                clock, watts, celsius, capped = (field.strip() for field in line.split(","))
                samples.append(
                    Sample(time.perf_counter(), float(clock), float(watts), float(celsius), capped == "Active")
                )

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield samples
        finally:
            process.terminate()
            reader.join()


def turn(run: Callable[[], int], seconds: float) -> dict[str, float]:
    """Runs ``run``, which returns how much it did, for so long."""
    run()
    with sampled() as samples:
        begin, done, times = time.perf_counter(), 0, []
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            done = run()
            times.append((start, time.perf_counter() - start))
    from_here = begin + SETTLED * seconds
    counted = [s for s in samples if s.at >= from_here]
    ms = statistics.median(took for start, took in times if start >= from_here) / done * 1e3
    watts = statistics.fmean(s.watts for s in counted)
    return {
        "ms": ms,
        "SM clock MHz": statistics.fmean(s.clock_mhz for s in counted),
        "least SM clock MHz": min(s.clock_mhz for s in counted),
        "W": watts,
        "J": watts * ms / 1e3,
        "C": max(s.celsius for s in counted),
        "share of samples at the power limit": statistics.fmean(s.capped for s in counted),
    }


def prompt_runner(model, prompt: int) -> Callable[[], int]:
    (setup,) = generate.setups(model, (), 1, prompt, generate.FEW).values()
    program, _ = generate.prefill_program(setup)

    def run() -> int:
        jax.block_until_ready(program(setup.weights, setup.inputs))
        return 1

    return run


def decode_runner(model, batch: int, prompt: int, new: int) -> Callable[[], int]:
    (setup,) = generate.setups(model, (), batch, prompt, new).values()
    shapes = generate.state(setup)
    program, _ = generate.decode_program(setup, shapes)
    steps = -(-(new - 1) // setup.static.look_every) * setup.static.look_every
    state = [generate.begin(setup, shapes)]

    def run() -> int:
        found = jax.block_until_ready(program(setup.weights, setup.inputs, state.pop(), np.int32(1 + steps)))
        # The same steps again: the end of the cache and the count of tokens are those of the beginning.
        cache = dataclasses.replace(found.cache, end=jnp.array(prompt, jnp.int32))
        state.append(dataclasses.replace(found, cache=cache, step=jnp.array(1, jnp.int32)))
        return steps

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODELS)
    parser.add_argument("--format", default="lane-planar")
    parser.add_argument("--layers", type=int, help="at most this many")
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32, 64])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4, help="of a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--name", default="power_model", help="of the file under bench/results")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no NVIDIA GPU")
    config = MODELS[args.model]
    config = with_layers(config, min(args.layers or config.num_layers, config.num_layers))
    params = jax.device_get(dense_layer(config, "real"))
    models = {
        args.format: whole_model(config, encode(params, args.format), True),
        DENSE: whole_model(config, params, True),
    }
    work = [(f"prompt of {n}", "prompt", lambda model, n=n: prompt_runner(model, n)) for n in args.prompts]
    work += [(f"batch {n}", "step", lambda model, n=n: decode_runner(model, n, 512, args.new)) for n in args.batches]
    rows = []
    for name, unit, make in work:
        runners = {weights: make(model) for weights, model in models.items()}
        for i in range(args.turns):
            for weights, run in runners.items():
                rows.append({"what": name, "unit": unit, "weights": weights, "turn": i, **turn(run, args.seconds)})
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        setup = {
            "model": args.model,
            "layers": config.num_layers,
            "what": "a program again and again, dense and compressed in turns",
            "ms, J": "of a step, or of a prompt to its first token",
            "samples": f"nvidia-smi every {SAMPLE_MS} ms, after {SETTLED:.0%} of each turn of {args.seconds} s",
        }
        path = harness.write_result(args.name, {"setup": setup, "rows": rows})
    print(path)


if __name__ == "__main__":
    main()
