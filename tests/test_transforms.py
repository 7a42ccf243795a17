"""A CompressedTensor under JAX's transformations: jit, vmap, scan, tree.map, shardings, donation, export."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxzip
from jaxzip.testing import bits, gaussian_weights

STACK = gaussian_weights((4, 256, 256))


@pytest.fixture(scope="module")
def stack():
    return jaxzip.compress(STACK)


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    return Mesh(np.array(jax.devices()[:4]), ("model",))


def x_of(n=3):
    return jax.random.normal(jax.random.key(0), (n, 256), jnp.bfloat16)


def layer(stack, i):
    return jax.tree.map(lambda leaf: leaf[i], stack)


def test_pytree_paths_name_the_payload(stack):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": stack})]
    assert "['w']['sign_mantissa']" in paths and len(paths) == 8


def test_shape_follows_the_leaves(stack):
    assert stack.format == "tca-tbe"
    assert stack.shape == (4, 256, 256) and layer(stack, 0).shape == (256, 256)
    assert stack.size == STACK.size and stack.ndim == 3


def test_weights_are_arguments_of_jit(stack):
    z = layer(stack, 0)
    f = jax.jit(jaxzip.matmul)
    lowered = f.lower(x_of(), z).as_text()
    assert max(len(line) for line in lowered.splitlines()) < 10_000  # no weight was baked in
    assert np.array_equal(bits(f(x_of(), z)), bits(jaxzip.matmul(x_of(), z)))


def test_eval_shape(stack):
    abstract = jax.eval_shape(lambda z: z, stack)
    assert abstract.shape == stack.shape and abstract.nbytes == stack.nbytes
    out = jax.eval_shape(jaxzip.decompress, abstract)
    assert out.shape == STACK.shape and out.dtype == jnp.bfloat16


def test_leaves_may_be_anything(stack):
    for value in (None, "a sharding", 3):
        mapped = jax.tree.map(lambda leaf: value, stack)
        assert mapped.core_shape == stack.core_shape
        repr(mapped)


def test_vmap_over_a_stack(stack):
    y = jax.vmap(jaxzip.matmul, (None, 0))(x_of(), stack)
    for i in range(4):
        assert np.array_equal(bits(y[i]), bits(jaxzip.matmul(x_of(), layer(stack, i))))


def test_scan_over_stacked_layers(stack):
    def step(x, z):
        return jnp.tanh(jaxzip.matmul(x, z)), None

    scanned, _ = jax.jit(lambda x, zs: jax.lax.scan(step, x, zs))(x_of(), stack)
    unrolled = x_of()
    for i in range(4):
        unrolled, _ = step(unrolled, layer(stack, i))
    assert np.array_equal(bits(scanned), bits(unrolled))


def test_tree_map_stacks_layers(stack):
    again = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer(stack, i) for i in range(4)))
    assert again.shape == stack.shape
    assert np.array_equal(bits(jaxzip.decompress(again)), bits(STACK))


def test_device_put_with_shardings(stack, mesh):
    replicated = jax.device_put(layer(stack, 0), NamedSharding(mesh, P()))
    assert np.array_equal(bits(jaxzip.decompress(replicated)), bits(STACK[0]))
    sharded = jax.device_put(stack, NamedSharding(mesh, P("model")))
    assert all(leaf.sharding.spec == P("model") for leaf in jax.tree.leaves(sharded))
    per_leaf = jax.device_put(stack, jax.tree.map(lambda leaf: NamedSharding(mesh, P("model")), stack))
    assert np.array_equal(bits(jaxzip.decompress(per_leaf)), bits(STACK))


def test_shard_map_multiplies_shards_of_the_output_features(mesh):
    """A kernel [K, M] split along M: one payload a shard, all of one shape, side by side in the leaves."""
    w = gaussian_weights((256, 1024))
    shards = jaxzip.compress(np.moveaxis(w.reshape(256, 4, 256), 1, 0))
    shards = jax.device_put(shards, NamedSharding(mesh, P("model")))

    def local(x, z):
        return jaxzip.matmul(x, jax.tree.map(lambda leaf: leaf[0], z))

    f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("model")), out_specs=P(None, "model")))
    assert np.array_equal(bits(f(x_of(), shards)), bits(jaxzip.matmul(x_of(), jaxzip.compress(w))))


def _split(f, mesh, in_specs, out_specs):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def _sums_and_gradient(f, *args):
    return jax.value_and_grad(lambda *args: f(*args).astype(jnp.float32).sum(), argnums=tuple(range(len(args))))(*args)


@pytest.mark.parametrize("implementation", [None, "xla", "ffi"])
def test_shard_map_splits_tokens_or_experts(mesh, stack, implementation):
    """``ragged_matmul`` as ``jax.lax.ragged_dot`` in the same places, and its gradient."""
    x, sizes = x_of(8), jnp.array([2, 1, 3, 2])
    sizes_of_two = jnp.array([[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 1, 1]])

    def tokens(x):
        local = lambda x, w, sizes: jaxzip.ragged_matmul(x, w, sizes[0], implementation=implementation)  # noqa: E731
        return _split(local, mesh, (P("model"), P(), P("model")), P("model"))(x, stack, sizes_of_two)

    def experts(x):
        # Each device has the rows of its own expert in front.
        ends = jnp.cumsum(sizes)
        mine = lambda x, at: jnp.roll(x, at, axis=0)  # noqa: E731

        def local(x, w, begin, size):
            y = jaxzip.ragged_matmul(mine(x, -begin[0]), w, size, implementation=implementation)
            return jax.lax.psum(mine(y, begin[0]), "model")

        return _split(local, mesh, (P(), P("model"), P("model"), P("model")), P())(x, stack, ends - sizes, sizes)

    # Each row's expert; the tokens' groups are per device, so there the second row goes to expert 1.
    for f, experts_of_rows in ((tokens, [0, 1, 1, 1, 2, 2, 2, 3]), (experts, [0, 0, 1, 2, 2, 2, 3, 3])):
        dense = STACK[np.array(experts_of_rows)]
        expected = _sums_and_gradient(lambda x, dense=dense: jnp.einsum("nk,nkm->nm", x, dense), x)
        for found, right in zip(jax.tree.leaves(_sums_and_gradient(f, x)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(found.astype(np.float32), right.astype(np.float32), rtol=0.02, atol=0.02)


def test_shard_map_takes_one_implementation_by_name(mesh):
    """What stands in for platforms that it is not for varies over the mesh as its results do."""
    table = jaxzip.compress(STACK[0], format="tca-tbe", output_axis=-2)
    take = lambda table, ids: jaxzip.take(table, ids, implementation="ffi")  # noqa: E731
    ids = jnp.array([7, 0, 255, 7])
    rows = _split(take, mesh, (P(), P("model")), P("model"))(table, ids)
    assert np.array_equal(bits(rows), bits(STACK[0])[np.array(ids)])


def test_gradients_through_shard_map(stack, mesh):
    """Of what is the same on all devices they are sums over them: of x where the weight is split, else of the bias."""
    z, x, bias = layer(stack, 0), x_of(8).astype(jnp.float32), jnp.ones(256, jnp.float32)
    product = lambda x, z, bias: jaxzip.matmul(x, z, bias=bias)  # noqa: E731
    rows = lambda x, bias: _split(product, mesh, (P("model"), P(), P()), P("model"))(x, z, bias)  # noqa: E731
    one = lambda x, shard: jaxzip.matmul(x, layer(shard, 0))  # noqa: E731
    columns = lambda x: _split(one, mesh, (P(), P("model")), P(None, "model"))(x, stack)  # noqa: E731
    together = lambda x: jnp.concatenate([jaxzip.matmul(x, layer(stack, i)) for i in range(4)], axis=1)  # noqa: E731
    for split, whole, args in (
        (rows, lambda x, bias: jaxzip.matmul(x, z, bias=bias), (x, bias)),
        (columns, together, (x,)),
    ):
        found, expected = (jax.tree.leaves(_sums_and_gradient(f, *args)) for f in (split, whole))
        for one_found, one_expected in zip(found, expected):
            np.testing.assert_allclose(one_found, one_expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def explicit(mesh):
    """What ``jax.make_mesh`` makes by default since jax 0.11."""
    return Mesh(mesh.devices, ("model",), axis_types=(AxisType.Explicit,))


def _put(value, mesh, *split):
    return jax.device_put(value, NamedSharding(mesh, P(*split)))


def _is_split(array, *split):
    return array.sharding.is_equivalent_to(NamedSharding(array.sharding.mesh, P(*split)), array.ndim)


@pytest.mark.parametrize("in_context", [True, False])
def test_explicit_axes(stack, explicit, in_context):
    """Results are split as those of JAX's own operations, and have the bits that one device computes."""
    z, ids = layer(stack, 0), jnp.arange(8).reshape(4, 2)
    table = z.T
    everywhere = [_put(w, explicit) for w in (z, table)]
    x = x_of(8).reshape(4, 2, 256)
    with jax.set_mesh(explicit) if in_context else contextlib.nullcontext():
        y = jaxzip.matmul(_put(x, explicit, "model"), everywhere[0])
        gathered = jaxzip.matmul(_put(x, explicit, None, None, "model"), everywhere[0])
        rows = jaxzip.take(everywhere[1], _put(ids, explicit, "model"))
        dense = jaxzip.decompress(_put(stack, explicit, "model"))
        products = jax.vmap(jaxzip.matmul, (None, 0))(_put(x, explicit), _put(stack, explicit, "model"))
    assert all(_is_split(array, "model") for array in (y, rows, dense, products)) and _is_split(gathered)
    alone = jaxzip.matmul(x, z)
    assert np.array_equal(bits(y), bits(alone)) and np.array_equal(bits(gathered), bits(alone))
    assert np.array_equal(bits(rows), bits(jaxzip.take(table, ids))) and np.array_equal(bits(dense), bits(STACK))
    assert np.array_equal(bits(products), bits(jax.vmap(jaxzip.matmul, (None, 0))(x, stack)))


@pytest.mark.parametrize("format", ["tca-tbe", "raw"])
def test_explicit_axes_and_experts(explicit, format):
    """All devices compute all rows: a group's may be on several of them."""
    stack = jaxzip.compress(STACK, format=format)
    f = lambda x, w, sizes: jaxzip.ragged_matmul(x, w, sizes)  # noqa: E731
    x, sizes = x_of(8), jnp.array([2, 1, 3, 2])
    for split in ((), ("model",)):
        with jax.set_mesh(explicit):
            y = f(_put(x, explicit, *split), _put(stack, explicit), _put(sizes, explicit))
        assert _is_split(y, *split) and np.array_equal(bits(y), bits(f(x, stack, sizes)))


@pytest.mark.parametrize("split", [("model",), (None, "model")])
def test_gradients_on_explicit_axes(stack, explicit, split):
    z, x, bias = layer(stack, 0), x_of(8).astype(jnp.float32), jnp.ones(256, jnp.float32)

    def gradients(x, bias, z):
        f = jax.grad(lambda x, bias: jnp.tanh(jaxzip.matmul(x, z, bias=bias)).sum(), argnums=(0, 1))
        return jax.jit(f)(x, bias)

    with jax.set_mesh(explicit):
        found = gradients(_put(x, explicit, *split), _put(bias, explicit), _put(z, explicit))
    assert _is_split(found[0], *split) and _is_split(found[1])
    for one, expected in zip(found, gradients(x, bias, z)):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_donation(stack):
    z = jax.tree.map(jnp.copy, stack)
    before = bits(jaxzip.decompress(z))
    moved = jax.jit(lambda z: jax.tree.map(lambda leaf: leaf + 0, z), donate_argnums=0)(z)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(z))
    assert np.array_equal(bits(jaxzip.decompress(moved)), before)


def test_export_and_back(stack):
    z, x = layer(stack, 0), x_of()
    f = jax.jit(lambda x, z: jaxzip.matmul(x, z, implementation="xla"))
    loaded = jax.export.deserialize(jax.export.export(f, platforms=["cpu"])(x, z).serialize())
    assert np.array_equal(bits(loaded.call(x, z)), bits(f(x, z)))


def test_export_of_the_fused_kernel(stack):
    from jaxzip.ffi import target_names

    z, x = layer(stack, 0), x_of()
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in target_names()]
    exported = jax.export.export(jax.jit(jaxzip.matmul), platforms=["cpu"], disabled_checks=checks)(x, z)
    loaded = jax.export.deserialize(exported.serialize())
    assert np.array_equal(bits(loaded.call(x, z)), bits(jaxzip.matmul(x, z)))


def test_gradient_leaves_the_weight_frozen(stack):
    z = layer(stack, 0)
    loss = lambda x, z: jaxzip.matmul(x, z).astype(jnp.float32).sum()  # noqa: E731
    grad_x, grad_z = jax.grad(loss, argnums=(0, 1), allow_int=True)(x_of(), z)
    assert grad_x.shape == x_of().shape and bool(jnp.any(grad_x != 0))
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(grad_z))


def test_adapters_train_on_frozen_weights(stack):
    """A low-rank adapter beside a compressed weight: the loss falls, the weight's bits stay."""
    z, x = layer(stack, 0), x_of(8).astype(jnp.float32)
    target = jax.random.normal(jax.random.key(5), (8, 256))
    lora = {"a": jax.random.normal(jax.random.key(6), (256, 8)) * 0.05, "b": jnp.zeros((8, 256))}

    @jax.jit
    def step(lora, z):
        def loss(lora):
            return jnp.mean((jaxzip.matmul(x, z) + x @ lora["a"] @ lora["b"] - target) ** 2)

        value, grads = jax.value_and_grad(loss)(lora)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, lora, grads)

    losses = []
    for _ in range(20):
        value, lora = step(lora, z)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
