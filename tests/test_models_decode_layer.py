"""A decode step's layer with its attention in the chain: which layers, and the reference of what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import Gemma2, Gemma3, LlamaConfig, Qwen3, decode_chain, family_of, generate
from jaxzip.models.execution import Execution
from jaxzip.models.layers import Embedding
from jaxzip.models.rope import rotation
from test_cuda_lowering import with_cuda_backend  # noqa: F401 - a fixture that every test here uses
from test_models_decode_chain import params

from jaxzip.ops.decode_layer import AttentionArrays, available, decode_layer
from jaxzip.testing import bits, gaussian_weights

# Sizes that no other test uses: JAX keeps traces, and with them the choice of implementation, for the process.
CONFIG = LlamaConfig(
    vocab_size=89, hidden_size=80, intermediate_size=104, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=64,
    max_position_embeddings=256, dtype="bfloat16",
)  # fmt: skip
SIZES = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
WINDOWS = {"sliding_window": 4, "layer_types": ("sliding_attention", "full_attention")}
CONFIGS = [
    CONFIG,
    Qwen3.config_class(**SIZES),
    Gemma2.config_class(**SIZES, **WINDOWS, query_pre_attn_scalar=144, attn_softcap=2.0),
    Gemma3.config_class(**{**SIZES, "tie_word_embeddings": True}, **WINDOWS),
]
NAMES = [config.model_type for config in CONFIGS]
SLOTS, STARTS, OWN = 12, (0, 3, 9), 9


def model_of(config):
    return family_of(config).from_params(config, params(config=config))


def draw(*shape, seed=0):
    return jnp.asarray(50 * gaussian_weights(shape, seed=seed + len(shape)))


def link(config, i):
    """What ``run_link`` gets for layer ``i``, and whether it is the last; rows have sequences of 10, 7 and 1 slots."""
    model = model_of(config)
    layer, (norm, projection) = model.layers[i], decode_chain._following(model)[i]
    n, start, own = len(STARTS), jnp.array(STARTS, jnp.int32), jnp.int32(OWN)
    x = draw(n, 1, config.hidden_size)
    qkv = layer.attn.project(layer.input_norm(x))
    angles = rotation(config, config.rope(i), (own - start)[:, None])
    cache = [draw(n, config.num_kv_heads, SLOTS, config.head_dim, seed=seed) for seed in (7, 8)]
    return (layer, norm, projection, qkv, x, angles, *cache, start, own), i == config.num_layers - 1


def operation(layer, norm, projection, qkv, x, *attended, is_head, **execution):
    """Arguments and options of ``decode_layer``."""
    arrays, scores = decode_chain._attention(layer.attn, qkv, *attended)
    options = decode_chain._options(layer, norm, is_head, Execution(**execution))
    return (arrays, x[:, 0], decode_chain._weights(layer, norm, projection)), scores | options


@pytest.mark.parametrize(("config", "i"), [(config, i % 2) for i, config in enumerate(CONFIGS)], ids=NAMES)
def test_the_reference_computes_the_layers_bits(config, i):
    """Run operation by operation: what XLA makes of a whole program may leave out roundings between its parts."""
    given, is_head = link(config, i)
    layer, norm, projection, _, x, *attended = given
    arguments, options = operation(*given, is_head=is_head)
    found = decode_layer(*arguments, **options, implementation="xla")
    after, *cache = layer(x, *attended, execution=Execution())
    h = norm(after)
    if isinstance(projection, Embedding):
        y = projection.attend(h)
    else:
        y = projection(h, out_dtype="float32" if is_head else None)
    for name, a, expected in zip(("x2", "y", "keys", "values"), found, (after[:, 0], y[:, 0], *cache), strict=True):
        assert a.dtype == expected.dtype, name
        assert np.array_equal(bits(a), bits(expected)), name
    # Only the new tokens' slot changes.
    for before, now in zip(attended[1:3], found[2:], strict=True):
        changed = (bits(before) != bits(now)).any((0, 1, 3))
        assert changed.tolist() == [slot == OWN for slot in range(SLOTS)]


def test_what_is_not_seen_has_no_effect():
    given, is_head = link(CONFIGS[2], 0)
    arguments, options = operation(*given, is_head=is_head)
    clean = decode_layer(*arguments, **options, implementation="xla")
    seen = np.arange(SLOTS) >= np.maximum(np.array(STARTS), OWN + 1 - options["window"])[:, None]
    seen &= np.arange(SLOTS) < OWN
    arrays = arguments[0]
    dirty = [jnp.where(seen[:, None, :, None], cache, jnp.nan) for cache in (arrays.keys, arrays.values)]
    dirty = arrays._replace(keys=dirty[0], values=dirty[1])
    found = decode_layer(dirty, *arguments[1:], **options, implementation="xla")
    assert np.array_equal(bits(found[0]), bits(clean[0])) and np.array_equal(bits(found[1]), bits(clean[1]))


@pytest.mark.parametrize("config", CONFIGS[1:3], ids=NAMES[1:3])
def test_a_step_on_the_cpu_is_the_ordinary_one(config):
    models = [model_of(config) for _ in range(2)]
    models[1].chain = False
    assert taken(config)
    prompts = [[5, 17, 3, 88, 41], [7, 2, 60]]
    chained, ordinary = (generate(m, prompts, max_new_tokens=8, return_logits=True) for m in models)
    assert chained.sequences() == ordinary.sequences()
    np.testing.assert_allclose(chained.logits, ordinary.logits, atol=2e-2)


def taken(config, **execution):
    given, is_head = link(config, 0)
    arguments, options = operation(*given, is_head=is_head, **execution)
    return available(*arguments, **options)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, True),
        ({"head_dim": 256}, True),
        ({"head_dim": 32}, False),
        ({"head_dim": 96}, False),
        ({"num_heads": 16, "num_kv_heads": 1}, True),
        ({"num_heads": 17, "num_kv_heads": 1}, False),
        ({"num_heads": 9, "num_kv_heads": 1, "head_dim": 256}, False),
    ],
)
def test_heads_that_a_gpu_takes(sizes, expected):
    config = dataclasses.replace(CONFIG, **sizes)
    assert taken(config) == taken(config, batch_invariant=True) == expected


def test_a_gpu_takes_bf16_in_all_arrays_and_so_many_rows():
    given, _ = link(CONFIG, 0)
    (arrays, x, weights), options = operation(*given, is_head=False)
    for name in ("keys", "start", "cos"):
        other = arrays._replace(**{name: getattr(arrays, name).astype(jnp.float16)})
        assert not available(other, x, weights, **options)
    for rows, invariant, expected in (
        (256, False, True),
        (257, False, False),
        (65535, True, True),
        (65536, True, False),
    ):
        of_rows = [jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for a in (*arrays[:6], x)]
        many = AttentionArrays(*of_rows[:6], arrays.own)
        assert available(many, of_rows[-1], weights, **{**options, "batch_invariant": invariant}) == expected


def test_errors():
    given, _ = link(CONFIGS[1], 0)
    (arrays, x, weights), options = operation(*given, is_head=False)

    def run(arrays=arrays, x=x, weights=weights, **other):
        return decode_layer(arrays, x, weights, **{**options, **other})

    cases = [
        ({"cos": arrays.cos[:, 1:]}, r"cos has shape \(3, 31\), expected \(3, 32\)"),
        ({"start": arrays.start[:2]}, r"start has shape \(2,\), expected \(3,\)"),
        ({"own": arrays.own[None]}, r"own has shape \(1,\), expected \(\)"),
        ({"values": arrays.values[:, :, 1:]}, r"values has shape \(3, 2, 11, 64\), expected \(3, 2, 12, 64\)"),
        ({"qkv": arrays.qkv[:2]}, r"qkv has shape \(2, 640\), expected \(3, 640\)"),
        ({"qkv": arrays.qkv[:, :-1]}, "qkv has 639 columns, expected those of a multiple of 2 heads"),
        ({"qkv": arrays.qkv[:, :256]}, "qkv has 256 columns, expected those of a multiple of 2 heads"),
        ({"qkv": arrays.qkv[:, :512]}, "o_proj takes 384 columns, attention gives 4 heads of 64"),
        ({"k_scale": arrays.k_scale[1:]}, r"k_scale has shape \(63,\), expected \(64,\)"),
        ({"k_scale": None}, "pass both of q_scale and k_scale, or neither"),
        ({"keys": arrays.keys[0]}, r"keys are \(2, 12, 64\), expected \[N, KVH, T, D\]"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"decode_layer: {message}"):
            run(arrays._replace(**wrong))
    with pytest.raises(ValueError, match="decode_layer: residual has 2 rows, expected 3"):
        run(x=x[:2])
    with pytest.raises(ValueError, match="decode_layer: there is a o_scale and no down_scale"):
        run(weights=weights._replace(o_scale=weights.mlp_scale))
    with pytest.raises(ValueError, match="decode_layer: activation is 'relu', expected one of silu, gelu_tanh"):
        run(activation="relu")
