"""``jaxzip generate CKPT --prompt TEXT``: text from compressed weights, streamed."""

from __future__ import annotations

import pathlib
import sys
import time
from typing import Annotated

import typer

from jaxzip.cli.console import err, fail


def generate_command(
    ckpt: Annotated[pathlib.Path, typer.Argument(help="A compressed checkpoint with its model's configuration.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from, or the user's message to a chat model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0 is all.", min=0, max=2**31 - 1)] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this probability mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.", min=-(2**63), max=2**63 - 1)] = 0,
    chat: Annotated[
        bool | None, typer.Option(help="Wrap the prompt as a chat message; default: if the tokenizer has chat tokens.")
    ] = None,
    implementation: Annotated[
        str | None, typer.Option(help="ffi, pallas, decompress or xla; default: the best one here.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The text that any batch would get, bit for bit; slower.")
    ] = False,
) -> None:
    """Generate text from a compressed checkpoint; prints it as it comes."""
    import jax

    from jaxzip.models import Sampling, load_model, stream
    from jaxzip.ops import implementations

    if implementation is not None and implementation not in implementations("matmul"):
        raise fail(f"--implementation {implementation!r}: there are {', '.join(implementations('matmul'))}")
    try:
        sampling = Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise fail(str(error)) from None
    if max_new_tokens < 1:
        raise fail(f"--max-new-tokens is {max_new_tokens}, expected 1 or more")
    model, tokenizer = load_model(ckpt, implementation=implementation)
    if chat and not tokenizer.has_chat:
        raise fail(f"--chat: the tokenizer of {ckpt} has no chat tokens; leave it out to complete plain text")
    if tokenizer.has_chat if chat is None else chat:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    options = {"max_new_tokens": max_new_tokens, "batch_invariant": batch_invariant}
    tokens = stream(model, ids, sampling=sampling, key=jax.random.key(seed), **options)
    decoder, times = tokenizer.stream_decoder(), []
    for token in tokens:
        times.append(time.perf_counter())
        _write(decoder.push(token))
    _write(decoder.flush() + "\n")
    # The first two tokens wait for prefill and decode to be compiled.
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        err.print(f"{len(times)} tokens, {rate:.1f} tokens/s after compilation")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
