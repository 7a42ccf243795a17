"""``generate`` and ``stream``: prefill and the decode loop, under one ``jax.jit``."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxzip.models.batching import bucket, pad_prompts
from jaxzip.models.cache import KVCache
from jaxzip.models.config import DecoderConfig
from jaxzip.models.decoder import Decoder
from jaxzip.models.params import variables
from jaxzip.models.sampling import GREEDY, Sampling, sample

from jaxzip.formats.auto import default_device
from jaxzip.tensor import CompressedTensor

#: Decode steps on a GPU between two looks at whether every row has ended: the host waits for the device to look, and
#: then starts the next step late.
LOOK_EVERY = 8


@dataclasses.dataclass(frozen=True)
class Generation:
    """What :func:`generate` returns, on the host.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``, the end-of-sequence token included, ``pad`` after it.
      lengths: int32 ``[B]``, tokens of each row that count.
      logits: fp32 ``[B, max_new_tokens, vocab_size]``, what each token was drawn from; ``None`` unless asked for, and
        zero where no row was running any more.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray | None = None

    def sequences(self) -> list[list[int]]:
        """The generated tokens of each row, without padding."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    eos: Sequence[int] | int | None = None,
    pad: int = 0,
    return_logits: bool = False,
    batch_invariant: bool = False,
) -> Generation:
    """Continues each prompt by up to ``max_new_tokens`` tokens.

    Prefill and the decode loop are one program, compiled for a bucket of prompt length and ``max_new_tokens``, the
    number of prompts and the kind of sampling; weights are its arguments. It ends early when every row has ended.

    Args:
      prompts: token ids, of different lengths; a row's result depends on the others only by rounding, and with
        ``batch_invariant`` not at all.
      sampling: how tokens are drawn.
      key: one PRNG key (``jax.random.key(seed)``); needed unless greedy. A row's draws depend on the key, the row's
        index and the step only.
      eos: token ids that end a row, or one; default: the config's. ``()`` never ends.
      pad: what fills ``tokens`` after a row's end.
      return_logits: keep the logits of every step (``4 * B * max_new_tokens * vocab_size`` bytes).
      batch_invariant: weights are compressed, and every product and sum of a row is computed in the same order whatever
        else is in the batch: the same sequence gets the same tokens. Prefill then decodes weights in the fused kernel
        however long the prompts are, and takes longer.

    Raises:
      NotImplementedError: ``batch_invariant`` and a weight is dense or in a format without such a kernel, or attention
        on a GPU has none (heads of other sizes than 32, 64, 128 and 256).
      PromptError: no prompt, an empty one, an id outside the vocabulary, or a prompt too long for the context.
      TypeError: ``max_new_tokens``, ``pad`` or a token id in ``eos`` is no integer, ``sampling`` is no Sampling, or
        ``key`` no PRNG key.
      ValueError: ``max_new_tokens`` is below 1, an integer has more than 32 bits, there is more than one key, sampling
        without a key, or an abstract model.
    """
    max_new_tokens = _integer("max_new_tokens", max_new_tokens)
    setup = _Setup.of(model, prompts, max_new_tokens, sampling, key, eos, pad, batch_invariant)
    run = _generate(setup.static, return_logits, setup.weights, setup.inputs)
    n = max_new_tokens
    logits = np.asarray(run.logits)[:, :n] if return_logits else None
    return Generation(np.asarray(run.tokens)[:, :n], np.asarray(run.lengths), logits)


def stream(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    eos: Sequence[int] | int | None = None,
    chunk: int = 1,
    batch_invariant: bool = False,
) -> Iterator[int]:
    """Yields the tokens that :func:`generate` gives for ``[prompt]``, as they come.

    Args:
      chunk: tokens decoded between two looks at the device; more is faster and less smooth. The cache is donated
        from one chunk to the next.

    Raises:
      As :func:`generate`, at the call and not at the first token.
    """
    chunk, max_new_tokens = _integer("chunk", chunk), _integer("max_new_tokens", max_new_tokens)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected 1 or more")
    setup = _Setup.of(model, [prompt], max_new_tokens, sampling, key, eos, 0, batch_invariant)
    return _stream(setup, chunk)


def _integer(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None


def _int32(name: str, value) -> np.int32:
    found, range_ = _integer(name, value), np.iinfo(np.int32)
    if not range_.min <= found <= range_.max:
        raise ValueError(f"{name} is {found}, expected a token id of 32 bits")
    return np.int32(found)


def _eos(eos, config: DecoderConfig) -> np.ndarray:
    """The token ids that end a row, int32 ``[N]``."""
    if eos is None:
        eos = config.eos_token_ids
    try:
        ids = [eos] if hasattr(eos, "__index__") and not getattr(eos, "shape", ()) else list(eos)
    except TypeError:
        ids = [eos]
    return np.array([_int32("eos", token) for token in ids], np.int32)


def _check_invariant(model: Decoder) -> None:
    """Raises NotImplementedError if ``model`` multiplies by dense weights: XLA's dot is not batch invariant.

    Routers may be dense, see ``jaxzip.models.moe``.
    """
    taken = ("kernel", "embedding") if model.config.tie_word_embeddings else ("kernel",)
    dense = [
        path
        for path, variable in variables(model)
        if path.endswith(taken) and not path.endswith("router/kernel")
        if not isinstance(variable.get_value(), CompressedTensor)
    ]
    if dense:
        more = f" and {len(dense) - 1} more are" if len(dense) > 1 else " is"
        raise NotImplementedError(
            f"batch_invariant: {dense[0]}{more} dense, and XLA chooses a dot's order of accumulation by its shape: not "
            'batch invariant; compress all weights (load_model\'s transform), with jaxzip.compress(w, format="raw") '
            "what would not shrink"
        )


def _check_weights(weights: nnx.State) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"the model is abstract: of {jax.tree_util.keystr(path)}, {leaf.dtype}{list(leaf.shape)}, it has the "
                "shape and no values; load_model has them, or restore_module"
            )


def _check_key(key) -> None:
    """Raises unless ``key`` is one PRNG key, typed or as ``jax.random.PRNGKey`` makes it."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != np.uint32 or not shape):
        raise TypeError(f"key is {key!r}, expected a PRNG key: jax.random.key(seed)")
    if shape if typed else len(shape) > 1:
        raise ValueError(f"key has shape {shape}, expected one key: rows of a batch draw from parts of it")


def _stream(setup: _Setup, chunk: int) -> Iterator[int]:
    run, shown = _start(setup.static, False, setup.weights, setup.inputs), 0
    while True:
        length, done = int(run.lengths[0]), bool(run.done[0])
        yield from np.asarray(run.tokens)[0, shown:length].tolist()
        shown = length
        limit = int(setup.inputs["limit"])
        if done or length >= limit:
            return
        run = _advance(setup.static, setup.weights, setup.inputs, run, np.int32(min(length + chunk, limit)))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a program is compiled for, besides the shapes of its arguments."""

    graphdef: nnx.GraphDef
    capacity: int
    kind: str
    batch_invariant: bool
    look_every: int


@dataclasses.dataclass(frozen=True)
class _Setup:
    static: _Static
    weights: nnx.State
    inputs: dict[str, jax.Array | np.ndarray]

    @classmethod
    def of(cls, model, prompts, max_new_tokens, sampling, key, eos, pad, batch_invariant=False) -> _Setup:
        tokens, start = pad_prompts(model.config, prompts, max_new_tokens)
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling is {sampling!r}, expected a jaxzip.models.Sampling")
        if key is None:
            if sampling.kind != "greedy":
                raise ValueError(f"{sampling} draws at random; pass key=jax.random.key(seed)")
            key = jax.random.key(0)
        _check_key(key)
        if batch_invariant:
            _check_invariant(model)
        graphdef, weights = nnx.split(model)
        _check_weights(weights)
        inputs = {
            "tokens": tokens,
            "start": start,
            "limit": np.int32(max_new_tokens),
            "eos": _eos(eos, model.config),
            "pad": _int32("pad", pad),
            "key": key,
            "sampling": sampling.values(),
        }
        look_every = LOOK_EVERY if default_device().platform == "gpu" else 1
        # Steps between two looks may go past the end.
        capacity = bucket(max_new_tokens) + look_every - 1
        return cls(_Static(graphdef, capacity, sampling.kind, batch_invariant, look_every), weights, inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Run:
    """The decode loop's state: ``step`` tokens of each row are known, the last of them not yet in the cache."""

    step: jax.Array
    last: jax.Array
    done: jax.Array
    lengths: jax.Array
    tokens: jax.Array
    logits: jax.Array | None
    cache: KVCache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(static: _Static, keep_logits: bool, weights: nnx.State, inputs) -> _Run:
    run = _prefill(static, keep_logits, weights, inputs)
    run = _loop(static, weights, inputs, run, inputs["limit"], static.look_every)
    return dataclasses.replace(run, cache=None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(static: _Static, keep_logits: bool, weights: nnx.State, inputs) -> _Run:
    return _prefill(static, keep_logits, weights, inputs)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)
def _advance(static: _Static, weights: nnx.State, inputs, run: _Run, until: jax.Array, look_every: int = 1) -> _Run:
    return _loop(static, weights, inputs, run, until, look_every)


def _prefill(static: _Static, keep_logits: bool, weights: nnx.State, inputs) -> _Run:
    model = nnx.merge(static.graphdef, weights)
    rows, width = inputs["tokens"].shape
    with jax.named_scope("prefill"):
        hidden, cache = model.prefill(
            inputs["tokens"], inputs["start"], width + static.capacity, batch_invariant=static.batch_invariant
        )
        logits = model.logits(hidden[:, -1], batch_invariant=static.batch_invariant)
    run = _Run(
        step=jnp.int32(0),
        last=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        lengths=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, static.capacity), inputs["pad"], jnp.int32),
        logits=jnp.zeros((rows, static.capacity, logits.shape[-1]), jnp.float32) if keep_logits else None,
        cache=cache,
    )
    return _record(static, inputs, run, logits)


def _loop(static: _Static, weights: nnx.State, inputs, run: _Run, until: jax.Array, look_every: int) -> _Run:
    def unfinished(run: _Run):
        return (run.step < until) & ~jnp.all(run.done)

    def decode(run: _Run) -> _Run:
        model = nnx.merge(static.graphdef, weights)
        with jax.named_scope("decode"):
            logits, cache = model.step(run.last, run.cache, batch_invariant=static.batch_invariant)
        return _record(static, inputs, dataclasses.replace(run, cache=cache), logits)

    def decode_some(run: _Run) -> _Run:
        return decode(run) if look_every == 1 else jax.lax.fori_loop(0, look_every, lambda _, run: decode(run), run)

    return jax.lax.while_loop(unfinished, decode_some, run)


def _record(static: _Static, inputs, run: _Run, logits: jax.Array) -> _Run:
    """Draws the next token of each row from ``logits[B, V]`` and writes it down; finished rows get padding.

    Tokens past the limit are written too, and do not count.
    """
    with jax.named_scope("sample"):
        drawn = sample(logits, inputs["key"], run.step, static.kind, inputs["sampling"])
    ends = jnp.any(drawn[:, None] == inputs["eos"][None, :], axis=1)
    shown = jnp.where(run.done, inputs["pad"], drawn)
    kept = run.logits
    if kept is not None:
        kept = jax.lax.dynamic_update_slice_in_dim(kept, logits[:, None], run.step, 1)
    return dataclasses.replace(
        run,
        step=run.step + 1,
        last=drawn,
        done=run.done | ends,
        lengths=run.lengths + (~run.done & (run.step < inputs["limit"])).astype(jnp.int32),
        tokens=jax.lax.dynamic_update_slice_in_dim(run.tokens, shown[:, None], run.step, 1),
        logits=kept,
    )
