"""compress_module on users' NNX modules: the same bits as the raw control, fused, and whatever NNX does to a model."""

import jax
import jax.numpy as jnp
import modules_models as models
import numpy as np
import pytest
from flax import nnx
from modules_checks import assert_same, lowered, targets

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.modules import (
    CompressedEmbed,
    CompressedKernel,
    DotGeneral,
    KernelRule,
    compress_with_report,
    transcode_module,
)
from jaxzip.testing import all_bit_patterns, gaussian_weights

BF16 = jnp.bfloat16
IDS = jax.random.randint(jax.random.key(3), (2, 7), 0, models.VOCAB)


def decoder(dtype=BF16):
    return models.NnxDecoder(dtype=dtype, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def dense():
    return decoder()


@pytest.fixture(scope="module")
def compressed(dense):
    return compress_with_report(dense)


@nnx.jit
def run(model, x):
    return model(x)


def with_weight(layer, w):
    """``layer`` with kernel ``w`` and no zero in its bias."""
    layer.kernel.set_value(jnp.asarray(w))
    if getattr(layer, "bias", None) is not None:
        layer.bias.set_value(jnp.asarray(gaussian_weights(layer.bias.shape, sigma=1.0, seed=5)))
    return layer


@pytest.mark.parametrize("dtype", [BF16, jnp.float32], ids=str)
def test_a_transformer_gives_the_bits_of_the_raw_control(dtype):
    model = decoder(dtype)
    compressed, report = compress_with_report(model)
    assert {row.path: row.format for row in report.tensors if len(row.shape) > 1 and row.size >= 4096} == {
        row.path: "tca-tbe" for row in report.tensors if len(row.shape) > 1 and row.size >= 4096
    }
    raw = transcode_module(compressed, "raw")
    out = run(compressed, IDS)
    assert_same(out, run(raw, IDS))
    expected = np.asarray(model(IDS), np.float32)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=scale * (1e-5 if dtype != BF16 else 0.02))


def test_every_weight_goes_through_the_fused_kernels(compressed):
    text = lowered(compressed[0], IDS)
    assert text.count("@jaxzip_tca_tbe_matmul") >= 1 and "jaxzip_tca_tbe_take" in text
    assert not any("decompress" in name for name in targets(text)), targets(text)
    assert max(len(line) for line in text.splitlines()) < 20_000  # no weight is a constant of the program


def test_shapes_outside_and_matrices_inside(compressed):
    model, report = compressed
    attention = model.layers[0].attention
    expected = {"query": ((64, 4, 32), (64, 128)), "out": ((4, 32, 64), (128, 64)), "key": ((64, 2, 32), (64, 64))}
    for name, (shape, matrix) in expected.items():
        kernel = getattr(attention, name).kernel
        assert isinstance(kernel, nnx.Param) and isinstance(kernel.get_value(), CompressedKernel)
        assert kernel.shape == shape and kernel.get_value().matrix.shape == matrix and kernel.dtype == BF16
    rows = {row.path: row for row in report.tensors}
    assert rows["layers/0/attention/query/kernel"].shape == (64, 4, 32)
    assert rows["layers/0/attention/query/bias"].note.startswith("fewer than")
    assert isinstance(model.embedder, CompressedEmbed) and report.ratio < 0.8


def test_the_given_model_stays_as_it_is(dense, compressed):
    kernel = dense.layers[0].attention.query.kernel
    assert isinstance(kernel.get_value(), jax.Array) and type(dense.embedder) is nnx.Embed
    assert_same(compressed[0].layers[0].attention.query.kernel.get_value().dense(), kernel.get_value())
    assert compressed[0].layers[0].norm1.scale.get_value() is not None


def test_split_merge_and_state(compressed):
    model = compressed[0]
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert_same(run(nnx.merge(graphdef, params, rest), IDS), run(model, IDS))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    again = nnx.clone(model)
    nnx.update(again, nnx.state(model))
    assert_same(run(again, IDS), run(model, IDS))
    assert nnx.graphdef(compress_with_report(decoder())[0]) == nnx.graphdef(model)  # equal models share a trace


def test_layers_of_one_shape_share_one_trace(compressed):
    a, b = (nnx.split(layer.attention.query) for layer in compressed[0].layers)
    assert a[0] == b[0]
    assert jax.tree.structure(a[1]) == jax.tree.structure(b[1])


def test_linear_with_every_bit_pattern_decodes_to_its_bits():
    layer = with_weight(nnx.Linear(256, 256, param_dtype=BF16, rngs=nnx.Rngs(0)), all_bit_patterns())
    z = jaxzip.compress_module(layer, [jaxzip.CompressionRule(format="lane-planar")])
    if isinstance(z.kernel.get_value(), CompressedKernel):
        assert_same(z.kernel.get_value().dense(), all_bit_patterns())
    patterns = all_bit_patterns().copy()
    patterns[:, 16:] = gaussian_weights((256, 240))
    z = jaxzip.compress_module(with_weight(layer, patterns))
    assert z.kernel.get_value().matrix.format == "tca-tbe"
    assert_same(z.kernel.get_value().dense(), patterns)


# Ragged sizes, 190 and 7 * 27, that still shrink: the formats pad to tiles of 64.
GENERAL = {
    "one axis to two": ((190,), (7, 27), (-1,), {}, (3, 5, 190)),
    "two axes to one": ((7, 27), (190,), (-2, -1), {}, (3, 5, 7, 27)),
    "axes apart": ((10, 19), (7, 27), (0, 2), {}, (10, 4, 19)),
    "a batch axis": ((190,), (189,), (-1,), {0: 2}, (2, 3, 190)),
    "no rows": ((190,), (7, 27), (-1,), {}, (0, 190)),
}


@pytest.mark.parametrize("case", GENERAL)
@pytest.mark.parametrize("dtype", [None, jnp.float16], ids=str)
def test_linear_general(case, dtype):
    inputs, outputs, axis, batch, shape = GENERAL[case]
    layer = nnx.LinearGeneral(
        inputs, outputs, axis=axis, batch_axis=batch, dtype=dtype, param_dtype=BF16, rngs=nnx.Rngs(0)
    )
    layer = with_weight(layer, gaussian_weights(layer.kernel.shape, seed=1))
    z = jaxzip.compress_module(layer, [jaxzip.CompressionRule(min_size=1)])
    kernel = z.kernel.get_value()
    assert isinstance(kernel, CompressedKernel) and kernel.shape == layer.kernel.shape
    assert_same(kernel.dense(), layer.kernel.get_value())
    x = jax.random.normal(jax.random.key(0), shape, BF16)
    y, want = z(x), layer(x)
    assert y.shape == want.shape and y.dtype == want.dtype
    assert_same(y, transcode_module(z, "raw")(x))
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(want, np.float32), rtol=0.01, atol=0.01)


EINSUMS = {
    "btd,ndh->btnh": ((3, 5, 190), (7, 190, 27)),
    "btnh,nhd->btd": ((3, 5, 7, 27), (7, 27, 190)),
    "bsd,ckdh->cbskh": ((3, 5, 190), (2, 4, 190, 24)),
    "...d,df->...f": ((2, 3, 190), (190, 189)),
    "bed,dfe->bfe": ((5, 2, 190), (190, 189, 2)),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum(equation):
    shape, kernel_shape = EINSUMS[equation]
    layer = with_weight(
        nnx.Einsum(equation, kernel_shape, dtype=BF16, param_dtype=BF16, rngs=nnx.Rngs(0)),
        gaussian_weights(kernel_shape, seed=2),
    )
    z = jaxzip.compress_module(layer, [jaxzip.CompressionRule(min_size=1)])
    assert isinstance(z.kernel.get_value(), CompressedKernel)
    x = jax.random.normal(jax.random.key(1), shape, BF16)
    assert not any("decompress" in name for name in targets(lowered(z, x)))
    assert "jaxzip_tca_tbe_matmul" in targets(lowered(z, x))
    assert_same(z(x), transcode_module(z, "raw")(x))
    np.testing.assert_allclose(np.asarray(z(x), np.float32), np.asarray(layer(x), np.float32), rtol=0.01, atol=0.01)


def test_another_equation_at_the_call_decodes_first():
    layer = nnx.Einsum("btd,dnh->btnh", (64, 8, 16), dtype=jnp.float32, param_dtype=BF16, rngs=nnx.Rngs(0))
    z = jaxzip.compress_module(layer)
    assert isinstance(z.kernel.get_value(), CompressedKernel)
    x = jax.random.normal(jax.random.key(1), (2, 3, 8, 16))
    assert_same(z(x, "btnh,dnh->btd"), layer(x, "btnh,dnh->btd"))


def test_dot_general_takes_axes_in_any_order():
    """Contracted axes paired in another order than the kernel's, several batch axes, and batch axes swapped."""
    w, shape = gaussian_weights((2, 3, 8, 16, 64)), (16, 3, 5, 2, 8)
    z = jaxzip.modules.compress_kernel(w, (2, 3), batch=(0, 1))
    assert z.matrix.format == "tca-tbe" and z.matrix.shape == (2, 3, 128, 64)
    assert_same(z.dense(), w)
    x = jax.random.normal(jax.random.key(0), shape, BF16)
    f = jax.jit(lambda x, z, dims: jaxzip.dot_general(x, z, dims), static_argnums=2)
    for dims, fused in [
        ((((0, 4), (3, 2)), ((3, 1), (0, 1))), True),
        ((((4, 0), (2, 3)), ((1, 3), (1, 0))), False),
    ]:
        want = jax.lax.dot_general(x, jnp.asarray(w), dims)
        assert ("jaxzip_tca_tbe_matmul" in targets(f.lower(x, z, dims).as_text())) == fused
        np.testing.assert_allclose(np.asarray(f(x, z, dims), np.float32), np.asarray(want, np.float32), atol=0.01)


def test_a_dtype_that_rounds_the_weight_decodes_first():
    """1e6 is infinite in fp16, and times zero no number: in the dense layer, and so in the compressed one."""
    w = gaussian_weights((64, 128))
    w[3, 5] = 1e6
    layer = with_weight(nnx.Linear(64, 128, dtype=jnp.float16, param_dtype=BF16, rngs=nnx.Rngs(0)), w)
    z, x = jaxzip.compress_module(layer), jnp.ones((2, 64), jnp.float16).at[:, 3].set(0)
    assert isinstance(z.kernel.get_value(), CompressedKernel) and np.isnan(layer(x)[0, 5])
    np.testing.assert_array_equal(z(x), layer(x))


def test_options_reach_the_kernels():
    layer = nnx.Linear(64, 128, param_dtype=BF16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 64), BF16)
    z = jaxzip.compress_module(layer, implementation="decompress")
    assert "jaxzip_tca_tbe_matmul" not in targets(lowered(z, x))
    with pytest.raises(NotImplementedError, match="batch invariant"):
        jaxzip.compress_module(layer, implementation="xla", batch_invariant=True)(x)


def test_export_and_back():
    layer = jaxzip.compress_module(nnx.LinearGeneral(64, (4, 32), param_dtype=BF16, rngs=nnx.Rngs(0)))
    kernel, x = layer.kernel.get_value(), jnp.ones((3, 64), BF16)
    f = jax.jit(lambda kernel, x: DotGeneral("xla")(x, kernel, (((1,), (0,)), ((), ()))))
    loaded = jax.export.deserialize(jax.export.export(f, platforms=["cpu"])(kernel, x).serialize())
    assert loaded.call(kernel, x).shape == (3, 4, 32)
    assert_same(loaded.call(kernel, x), f(kernel, x))


def test_lora_linear_and_remat_of_flax():
    layer = nnx.LoRALinear(64, 128, lora_rank=2, dtype=jnp.float32, param_dtype=BF16, rngs=nnx.Rngs(0))
    z, x = jaxzip.compress_module(layer), jax.random.normal(jax.random.key(0), (3, 64))
    assert isinstance(z.kernel.get_value(), CompressedKernel)
    np.testing.assert_allclose(z(x), layer(x), rtol=1e-4, atol=1e-5)
    gradient = lambda m, f: nnx.grad(lambda m: f(m, x).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(m)  # noqa: E731
    plain, again = gradient(z, lambda m, x: m(x)), gradient(z, nnx.remat(lambda m, x: m(x)))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert_same(a, b)


def test_arguments_may_be_sharded(compressed):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    graphdef, state = nnx.split(compressed[0])
    model = nnx.merge(graphdef, jax.device_put(state, sharding))
    assert_same(run(model, jax.device_put(IDS, sharding)), run(compressed[0], IDS))


def test_embed_looks_up_and_attends():
    layer = nnx.Embed(189, 190, param_dtype=BF16, rngs=nnx.Rngs(0))
    layer.embedding.set_value(jnp.asarray(gaussian_weights((189, 190))))
    z = jaxzip.compress_module(layer)
    assert isinstance(z, CompressedEmbed) and z.embedding.get_value().format == "tca-tbe"
    ids = jnp.asarray([[0, 188, -1], [3, 189, -190]])  # the last two are outside: rows of NaN, as Flax has it
    want = layer(ids)
    assert_same(z(ids[:, :1]), want[:, :1])
    assert_same(z(ids[0]), want[0])
    assert jnp.isnan(z(ids)[1, 1:]).all() and jnp.isnan(want[1, 1:]).all()
    query = jax.random.normal(jax.random.key(0), (3, 190), BF16)
    table = z.embedding[...]  # as Flax reads parameters
    assert_same(query @ table.T, z.attend(query))
    assert_same(table[ids[0]], layer.embedding[...][ids[0]])
    assert_same(z.embedding[3:5, 1], layer.embedding[3:5, 1])
    with pytest.raises(TypeError, match="not iterable"):
        iter(table)
    assert_same(z.attend(query), transcode_module(z, "raw").attend(query))
    np.testing.assert_allclose(
        np.asarray(z.attend(query), np.float32), np.asarray(layer.attend(query), np.float32), rtol=0.01, atol=0.01
    )
    with pytest.raises(ValueError, match="expected integers"):
        z(query)


def test_out_sharding_decodes_first():
    layer = nnx.Embed(192, 64, param_dtype=BF16, rngs=nnx.Rngs(0))
    linear = nnx.Linear(64, 128, param_dtype=BF16, rngs=nnx.Rngs(0))
    z, z_linear = jaxzip.compress_module(layer), jaxzip.compress_module(linear)
    ids, query = jnp.asarray([[0, 188, 5]]), jax.random.normal(jax.random.key(0), (1, 3, 64), BF16)
    spec = jax.sharding.PartitionSpec("x", None, None)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for found, want in ((z(ids, spec), layer(ids, spec)), (z.attend(query, spec), layer.attend(query, spec))):
            assert_same(found, want)
            assert found.sharding == want.sharding
        assert_same(z_linear(query, spec), linear(query, spec))


def test_tables_of_one_row_and_in_a_dtype_that_rounds():
    """Flax gives the only row for any id; a bf16 table in fp16 is rounded, so that it is decoded first."""
    for rows in (1, 128):
        layer = nnx.Embed(rows, 64, dtype=jnp.float16, param_dtype=BF16, rngs=nnx.Rngs(0))
        layer.embedding.set_value(layer.embedding.get_value().at[0, 1].set(1e6))
        z = nnx.clone(layer)
        z.embedding.set_value(encode_as(layer.embedding.get_value(), "tca-tbe", -2))
        z = CompressedEmbed(z)
        ids, query = jnp.asarray([0, 5]), jnp.ones((2, 64), jnp.float16).at[:, 1].set(0)
        assert_same(z(ids), layer(ids))
        assert np.isnan(z.attend(query)[:, 0]).all()
        np.testing.assert_array_equal(z.attend(query), layer.attend(query))


def test_multi_head_attention_of_flax():
    layer = nnx.MultiHeadAttention(
        4, 64, dtype=jnp.float32, param_dtype=BF16, decode=False, deterministic=True, rngs=nnx.Rngs(0)
    )
    z = jaxzip.compress_module(layer)
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    assert isinstance(z.out.kernel.get_value(), CompressedKernel)
    assert_same(z(x), transcode_module(z, "raw")(x))
    np.testing.assert_allclose(np.asarray(z(x)), np.asarray(layer(x)), rtol=1e-4, atol=1e-5)


def test_a_stack_of_layers_stays_a_stack():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stacked(rngs):
        return models.NnxAttention(dtype=BF16, rngs=rngs)

    layers = stacked(nnx.Rngs(0))
    z = jaxzip.compress_module(layers)
    kernel = z.query.kernel.get_value()
    assert kernel.shape == (3, 64, 4, 32) and kernel.matrix.shape == (3, 64, 128)
    assert_same(kernel.dense(), layers.query.kernel.get_value())

    @nnx.jit
    def scan(layers, x):
        graphdef, state = nnx.split(layers)
        return jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, state)[0]

    x = jax.random.normal(jax.random.key(2), (2, 5, models.DIM), BF16)
    assert_same(scan(z, x), scan(transcode_module(z, "raw"), x))
    want = np.asarray(scan(layers, x), np.float32)
    np.testing.assert_allclose(np.asarray(scan(z, x), np.float32), want, atol=0.02 * np.abs(want).max())


class Tied(nnx.Module):
    """Two layers with one parameter object; their own module with a weight that no layer holds."""

    def __init__(self, rngs):
        options = {"param_dtype": BF16, "use_bias": False, "rngs": rngs}
        self.first = nnx.Linear(64, 64, **options)
        self.second = nnx.Linear(64, 64, **options)
        self.second.kernel = self.first.kernel
        self.w = nnx.Param(jnp.asarray(gaussian_weights((4, 64, 32), seed=3)))

    def __call__(self, x):
        return jaxzip.einsum("td,ndh->tnh", self.second(self.first(x)), self.w[...])


def test_shared_parameters_stay_shared():
    z = jaxzip.compress_module(Tied(nnx.Rngs(0)))
    assert z.first.kernel is z.second.kernel and isinstance(z.first.kernel.get_value(), CompressedKernel)


def test_parameters_of_own_modules():
    model, x = Tied(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (3, 64), BF16)
    plain, report = compress_with_report(model)
    assert isinstance(plain.w.get_value(), jax.Array)
    assert "no layer of Flax" in next(row.note for row in report.tensors if row.path == "w")
    rules = [KernelRule("w", einsum="td,ndh->tnh"), jaxzip.CompressionRule()]
    z = jaxzip.compress_module(model, rules)
    assert z.w.get_value().matrix.shape == (64, 128) and z.w.shape == (4, 64, 32)
    assert not any("decompress" in name for name in targets(lowered(z, x)))
    assert_same(z(x), transcode_module(z, "raw")(x))
    assert_same(jnp.einsum("td,ndh->tnh", x, z.w[...]), jnp.einsum("td,ndh->tnh", x, model.w[...]))
    w, x = z.w[...], x.astype(jnp.float32)
    assert_same(w[1], model.w[...][1])
    assert_same(2 * w - 1, 2 * model.w[...] - 1)
    assert_same(-z.w.get_value() * np.ones((), BF16), -model.w[...])
    assert_same(w.T, model.w[...].T)
    assert_same(x @ z.w, x @ model.w)
    assert_same(np.asarray(x) @ w, np.asarray(x) @ model.w[...])


def test_rules_choose_and_are_reported():
    rules = [
        jaxzip.CompressionRule(r".*attention.*", format="lane-planar"),
        jaxzip.CompressionRule(r".*mlp/up.*", format="raw"),
        jaxzip.CompressionRule("nowhere"),
    ]
    model, report = compress_with_report(decoder(), rules)
    rows = {row.path: row for row in report.tensors}
    assert rows["layers/0/attention/out/kernel"].format == "lane-planar"
    assert rows["layers/1/mlp/up/kernel"].note == "rule says raw"
    assert rows["embedder/embedding"].note == "no rule matches" and type(model.embedder) is nnx.Embed
    assert report.unused_rules == (rules[2],)


def test_compressing_twice_changes_nothing(compressed):
    again, report = compress_with_report(compressed[0])
    assert_same(run(again, IDS), run(compressed[0], IDS))
    assert not any(row.path.endswith("query/kernel") for row in report.tensors)


def test_errors():
    with pytest.raises(TypeError, match="expected an nnx.Module, got dict"):
        jaxzip.compress_module({"kernel": jnp.ones((4, 4))})
    with pytest.raises(TypeError, match="kernel: compress_kernel .* compress outside of jit"):
        nnx.jit(jaxzip.compress_module)(nnx.Linear(64, 64, param_dtype=BF16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="second"):
        KernelRule("w", einsum="ij->ji")
    z = jaxzip.compress_module(nnx.Linear(64, 64, param_dtype=BF16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="axis 1 of the input .2, 65. has size 65, axis 0 of the kernel"):
        z(jnp.ones((2, 65), BF16))
    with pytest.raises(ValueError, match="rank"):
        jaxzip.einsum("btd,df->btf", jnp.ones((2, 64)), z.kernel[...])
    with pytest.raises(TypeError, match=r"got CompressedKernel; .*jaxzip\.einsum"):
        jaxzip.matmul(jnp.ones((2, 64), BF16), z.kernel.get_value())
    with pytest.raises(TypeError, match=r"got CompressedKernel; its array is z\.dense\(\)"):
        jaxzip.decompress(z.kernel.get_value())


def test_compressed_tensors_in_einsum():
    x = jax.random.normal(jax.random.key(0), (3, 5, 64), BF16)
    stack, table = gaussian_weights((3, 64, 128)), gaussian_weights((128, 64))
    cases = [("ebk,ekm->ebm", stack, -1), ("ebk,mk->ebm", table, -2), ("ebk,km->ebm", stack[0], -1)]
    for equation, w, axis in cases:
        z = jaxzip.compress(w, format="tca-tbe", output_axis=axis)
        f = jax.jit(lambda x, z: jaxzip.einsum(equation, x, z))  # noqa: B023 - called in the loop
        assert targets(f.lower(x, z).as_text()) == {"jaxzip_tca_tbe_matmul"}
        want = jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)
        np.testing.assert_allclose(np.asarray(f(x, z), np.float32), np.asarray(want), rtol=0.01, atol=0.005)
