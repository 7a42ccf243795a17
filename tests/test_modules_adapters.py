"""LoRA on a compressed base: gradients are the dense model's, the loss falls, the base's bits stay."""

import jax
import jax.numpy as jnp
import modules_models as models
import numpy as np
import optax
import pytest
from flax import nnx

import jaxzip
from jaxzip.modules import Adapted, add_adapters, is_compressed, transcode_module
from jaxzip.testing import bits

BF16 = jnp.bfloat16
IDS = jax.random.randint(jax.random.key(3), (4, 9), 0, models.VOCAB)


def decoder():
    return models.NnxDecoder(dtype=jnp.float32, rngs=nnx.Rngs(0))


def adapted(model):
    """The same adapters on any model; ``lora_b`` is not zero, so that both halves have a gradient."""
    model = add_adapters(model, 4, r".*attention/(query|out)", alpha=8, rngs=nnx.Rngs(1))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            seed = sum(map(ord, "/".join(map(str, path))))
            variable.set_value(0.02 * jax.random.normal(jax.random.key(seed), variable.get_value().shape))
            nnx.update(model, nnx.from_flat_state([(path, variable)]))
    return model


def loss(model, ids):
    logits = model(ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


adapters_of = nnx.DiffState(0, nnx.LoRAParam)


@nnx.jit
def gradient(model, ids):
    return nnx.value_and_grad(loss, argnums=adapters_of)(model, ids)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def payload(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, is_compressed))]


def test_gradients_are_the_dense_models():
    dense, base = adapted(decoder()), jaxzip.compress_module(decoder())
    compressed = adapted(base)
    raw = transcode_module(compressed, "raw")
    (value, found), (raw_value, control), (dense_value, want) = (gradient(m, IDS) for m in (compressed, raw, dense))
    assert bits(value) == bits(raw_value)
    np.testing.assert_allclose(value, dense_value, rtol=1e-6)
    found, control, want = leaves(found), leaves(control), leaves(want)
    assert found.keys() == want.keys() and len(found) == 2 * 2 * models.LAYERS
    for name, leaf in found.items():
        assert np.abs(leaf).max() > 0
        np.testing.assert_array_equal(bits(leaf), bits(control[name]))
        # fp32 sums in another order: that is all in which the dense model differs.
        np.testing.assert_allclose(leaf, want[name], rtol=1e-4, atol=1e-5 * np.abs(want[name]).max())


def test_gradients_equal_the_dense_models_bit_for_bit_where_sums_are_exact():
    """Small integers times powers of two: no sum rounds, so that the order of summation cannot show."""

    def whole(shape, seed, limit=3):
        return np.random.default_rng(seed).integers(-limit, limit + 1, shape).astype(np.float32)

    class Mlp(nnx.Module):
        def __init__(self):
            options = {"dtype": jnp.float32, "param_dtype": BF16, "use_bias": False, "rngs": nnx.Rngs(0)}
            self.up = nnx.LinearGeneral(64, (4, 32), **options)
            self.down = nnx.LinearGeneral((4, 32), 64, axis=(-2, -1), **options)
            self.up.kernel.set_value(jnp.asarray(whole((64, 4, 32), 1) * 0.25, BF16))
            self.down.kernel.set_value(jnp.asarray(whole((4, 32, 64), 2) * 0.25, BF16))

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    def with_adapters(model):
        model = add_adapters(model, 2, rngs=nnx.Rngs(0))
        for seed, layer in ((3, model.up), (5, model.down)):
            layer.lora_a.set_value(jnp.asarray(whole(layer.lora_a.shape, seed, 1)))
            layer.lora_b.set_value(jnp.asarray(whole(layer.lora_b.shape, seed + 1, 1)))
        return model

    def objective(model, x):
        return (model(x) * jnp.asarray(whole((3, 64), 9))).sum()

    compressed = with_adapters(jaxzip.compress_module(Mlp()))
    assert isinstance(compressed.up, Adapted) and jax.tree.leaves(nnx.state(compressed, is_compressed))
    x = jnp.asarray(whole((3, 64), 7))
    grads = [nnx.grad(objective, argnums=adapters_of)(m, x) for m in (compressed, with_adapters(Mlp()))]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_array_equal(bits(a), bits(b))
    to_x = [jax.grad(lambda x, m=m: objective(m, x))(x) for m in (compressed, with_adapters(Mlp()))]
    np.testing.assert_array_equal(bits(to_x[0]), bits(to_x[1]))


def test_training_lowers_the_loss_and_leaves_the_base():
    base = jaxzip.compress_module(decoder())
    model = add_adapters(base, 4, r".*attention/(query|out)", rngs=nnx.Rngs(1))
    run = nnx.jit(lambda model: model(IDS))
    np.testing.assert_array_equal(bits(run(model)), bits(run(base)))  # untrained adapters change nothing
    before, shared = payload(model), nnx.state(base, is_compressed)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, ids):
        value, grads = nnx.value_and_grad(loss, argnums=adapters_of)(model, ids)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, IDS)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0] and all(np.isfinite(losses))
    assert all(np.array_equal(a, b) for a, b in zip(before, payload(model), strict=True))
    assert len(jax.tree.leaves(shared)) == len(before)
    moments = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.size > 1)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


def test_what_is_not_compressed_trains_too():
    model = jaxzip.compress_module(decoder())
    rest = nnx.All(nnx.Param, nnx.Not(is_compressed))
    grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, rest)))(model, IDS)
    names = set(leaves(grads))
    assert any("norm1" in name for name in names) and not any("payload" in name or "matrix" in name for name in names)


def test_differentiating_the_encoded_weights_is_an_error():
    model = jaxzip.compress_module(nnx.Linear(64, 64, param_dtype=BF16, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        nnx.grad(lambda model: model(jnp.ones((1, 64), BF16)).sum())(model)


def test_raw_weights_are_frozen_too():
    raw = transcode_module(jaxzip.compress_module(nnx.Linear(64, 64, param_dtype=BF16, rngs=nnx.Rngs(0))), "raw")
    grads = nnx.grad(lambda model: model(jnp.ones((1, 64), BF16)).astype(jnp.float32).sum())(raw)
    assert not np.asarray(grads["kernel"].get_value().matrix.payload["values"]).any()
    assert np.asarray(grads["bias"].get_value()).all()


def test_adapters_merge_split_and_scale():
    layer = nnx.Linear(64, 64, dtype=jnp.float32, param_dtype=BF16, use_bias=False, rngs=nnx.Rngs(0))
    model = Adapted(jaxzip.compress_module(layer), 2, alpha=6, rngs=nnx.Rngs(0))
    model.lora_b.set_value(jnp.ones((2, 64)))
    x = jax.random.normal(jax.random.key(0), (3, 64))
    want = x @ (layer.kernel[...].astype(jnp.float32) + 3 * model.lora_a[...] @ model.lora_b[...])
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-4)
    graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    np.testing.assert_array_equal(bits(nnx.merge(graphdef, adapters, base)(x)), bits(model(x)))


def stack_of_layers(axis):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=axis)
    def stacked(rngs):
        return nnx.Dict(up=nnx.Linear(64, 128, rngs=rngs, param_dtype=BF16))

    return stacked(nnx.Rngs(0))


def test_a_stack_of_layers_gets_a_stack_of_adapters():
    model = add_adapters(jaxzip.compress_module(stack_of_layers(0)), 2, rngs=nnx.Rngs(1))
    up = model.up
    assert up.lora_a.shape == (3, 64, 2) and up.lora_b.shape == (3, 2, 128)
    up.lora_b.set_value(jax.random.normal(jax.random.key(2), (3, 2, 128)))
    x = jax.random.normal(jax.random.key(3), (5, 64))
    scan = nnx.scan(lambda y, layer: y + layer.up(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    found = scan(jnp.zeros((5, 128)), model)
    updates = sum(x @ up.lora_a[i] @ up.lora_b[i] for i in range(3))
    bases = scan(jnp.zeros((5, 128)), nnx.Dict(up=up.base))
    np.testing.assert_allclose(np.asarray(found), np.asarray(bases + updates), rtol=1e-4, atol=1e-4)


def test_an_untrained_adapter_gives_equal_results():
    base = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 64)).at[0].set(0)
    np.testing.assert_array_equal(Adapted(base, 2, rngs=nnx.Rngs(1))(-x), base(-x))


def test_errors():
    rngs = nnx.Rngs(0)
    with pytest.raises(TypeError, match="Conv is neither"):
        Adapted(nnx.Conv(4, 4, (3,), rngs=rngs), 2, rngs=rngs)
    with pytest.raises(TypeError, match="not over the last axes"):
        Adapted(nnx.LinearGeneral(4, 4, axis=0, rngs=rngs), 2, rngs=rngs)
    with pytest.raises(TypeError, match="its stack axis is not the first"):
        Adapted(stack_of_layers(-1).up, 2, rngs=rngs)
    with pytest.raises(ValueError, match="rank is 0"):
        Adapted(nnx.Linear(4, 4, rngs=rngs), 0, rngs=rngs)
    with pytest.raises(ValueError, match="names no nnx.Linear"):
        add_adapters(decoder(), 2, "nowhere", rngs=rngs)
    with pytest.raises(ValueError, match="NnxMlp is neither"):
        add_adapters(decoder(), 2, r".*mlp", rngs=rngs)
