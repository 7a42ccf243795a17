"""Compressed parameters of users' Linen modules: unmodified, fused, with one line changed, scanned, and by hooks."""

import contextlib
import re

import jax
import jax.numpy as jnp
import modules_models as models
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from modules_checks import assert_same

import jaxzip
from jaxzip import checkpoint
from jaxzip.modules import KernelBox, KernelRule, compress_linen, find_uses, fused, promote_dtype_linen
from jaxzip.rules import DEFAULT_RULES
from jaxzip.tensor import CompressedTensor

BF16 = jnp.bfloat16
IDS = jax.random.randint(jax.random.key(3), (2, 7), 0, models.VOCAB)
RULES = (
    KernelRule(r".*/q_einsum/w", einsum="BTD,NDH->BTNH"),
    KernelRule(r".*/kv_einsum/w", einsum="BSD,CKDH->CBSKH"),
    KernelRule(r".*/attn_vec_einsum/w", einsum="BTNH,NHD->BTD"),
    *DEFAULT_RULES,
)


class OneLineChanged(nn.Module):
    """``models.LinenEinsum`` with jaxzip's einsum."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(0.05, BF16), self.shape)
        return jaxzip.einsum(equation, x, w)


def raw(params):
    compressed = lambda leaf: isinstance(leaf, CompressedTensor)  # noqa: E731
    return jax.tree.map(lambda z: jaxzip.transcode(z, "raw") if compressed(z) else z, params, is_leaf=compressed)


def targets(f, *args):
    return set(re.findall(r"jaxzip_\w+", jax.jit(f).lower(*args).as_text()))


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def case(request):
    """A model, its dense and its compressed parameters."""
    model = models.LinenDecoder(OneLineChanged, scan=request.param)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    z, report = compress_linen(params, RULES, uses=find_uses(model, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype)))
    return model, params, z, report


def test_shapes_and_report(case):
    model, params, z, report = case
    big = {row.path for row in report.tensors if row.size >= 4096 and len(row.shape) > 1}
    assert {row.path for row in report.tensors if row.format == "tca-tbe"} == big and len(big) > 5
    assert report.unused_rules == ()
    layer, dense = (tree["layers" if model.scan else "layer_0"]["attn"]["kv_einsum"]["w"] for tree in (z, params))
    assert isinstance(layer, KernelBox) and layer.shape == dense.shape
    lead = (models.LAYERS,) if model.scan else ()
    assert layer.value.matrix.shape == (*lead, 64, 128)  # [D, C*K*H]
    assert_same(layer.value.dense(), dense)


def test_an_unmodified_model_decodes_and_gives_the_dense_bits(case):
    model, params, z, _ = case
    plain = models.LinenDecoder(models.LinenEinsum, scan=model.scan)
    apply = jax.jit(lambda params: plain.apply({"params": params}, IDS))
    assert_same(apply(z), apply(params))


def test_fused_gives_the_bits_of_the_raw_control(case):
    model, params, z, _ = case

    def f(z, ids):
        with fused():
            return model.apply({"params": z}, ids)

    assert targets(f, z, IDS) == {"jaxzip_tca_tbe_matmul", "jaxzip_tca_tbe_take"}
    y = jax.jit(f)(z, IDS)
    assert_same(y, jax.jit(f)(raw(z), IDS))
    want = jax.jit(lambda params: model.apply({"params": params}, IDS))(params)
    assert_same(jax.jit(f)(params, IDS), want)  # nothing is compressed: nothing changes
    want = np.asarray(want, np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), want, atol=0.02 * np.abs(want).max())


def test_without_uses_only_what_is_known_is_compressed():
    model = models.LinenDecoder()
    params = model.init(jax.random.key(0), IDS)["params"]
    z, report = compress_linen(params)
    rows = {row.path: row for row in report.tensors}
    assert rows["embedder/embedding"].format == rows["layer_0/mix/kernel"].format == "tca-tbe"
    assert "find_uses" in rows["layer_0/up/kernel"].note and "KernelRule" in rows["layer_0/attn/q_einsum/w"].note
    assert_same(model.apply({"params": z}, IDS), model.apply({"params": params}, IDS))
    again, report = compress_linen(z)
    assert jax.tree.structure(again) == jax.tree.structure(z)


def test_parameters_from_a_converted_checkpoint(tmp_path):
    model = models.LinenDecoder()
    params = model.init(jax.random.key(0), IDS)["params"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "dense", params)
    checkpoint.convert(tmp_path / "dense", tmp_path / "converted")
    loaded = checkpoint.open_checkpoint(tmp_path / "converted").load_tree()
    assert isinstance(loaded["layer_0"]["out"]["kernel"], CompressedTensor)
    uses = find_uses(model, IDS)
    boxed, report = compress_linen(loaded, RULES, uses=uses)
    want, want_report = compress_linen(params, RULES, uses=uses)
    assert jax.tree.structure(boxed) == jax.tree.structure(want) and report.stored_bytes == want_report.stored_bytes
    for a, b in zip(jax.tree.leaves(boxed), jax.tree.leaves(want), strict=True):
        assert_same(a, b)


def test_kernels_in_boxes_of_flax():
    """Partitioning metadata around a kernel stays; the kernel is decoded where it is used."""

    class Sharded(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(0.05), (None, "model"))
            return nn.Dense(128, use_bias=False, param_dtype=BF16, kernel_init=init)(x)

    x = jax.random.normal(jax.random.key(1), (3, 64), BF16)
    params = Sharded().init(jax.random.key(0), x)["params"]
    z, report = compress_linen(params)
    assert [row.format for row in report.tensors] == ["tca-tbe"]
    assert isinstance(z["Dense_0"]["kernel"], nn.Partitioned)
    with fused():
        assert_same(Sharded().apply({"params": z}, x), Sharded().apply({"params": params}, x))


def test_hooks_given_to_the_layers():
    """What ``fused`` does for unmodified models, a model may do itself."""
    hooks = {"dot_general": jaxzip.dot_general, "promote_dtype": promote_dtype_linen}

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 64), axis=(-2, -1), param_dtype=BF16, **hooks)(x)
            return nn.Dense(128, param_dtype=BF16, **hooks)(x)

    x = jax.random.normal(jax.random.key(1), (3, 4, 32), BF16)
    params = Mlp().init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.01, leaf.dtype), params)  # biases are not zero
    z, _ = compress_linen(params, uses=find_uses(Mlp(), x))
    apply = lambda z, x: Mlp().apply({"params": z}, x)  # noqa: E731
    assert targets(apply, z, x) == {"jaxzip_tca_tbe_matmul"}
    assert_same(apply(z, x), apply(raw(z), x))
    np.testing.assert_allclose(
        np.asarray(apply(z, x), np.float32), np.asarray(apply(params, x), np.float32), rtol=0.02, atol=0.01
    )


def test_batch_axes_biases_and_equations_of_calls():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral(128, batch_dims=0, param_dtype=BF16, name="a", bias_init=nn.initializers.ones)(x)
            x = nn.Einsum((2, 128, 64), "etd,edf->tfe", param_dtype=BF16, name="b", bias_init=nn.initializers.ones)(x)
            return nn.Einsum((64, 2, 64), param_dtype=BF16, name="c", bias_init=nn.initializers.normal(1.0))(
                x, "...fe,feg->...g"
            )

    x = jax.random.normal(jax.random.key(1), (2, 5, 64), BF16)
    params = Experts().init(jax.random.key(0), x)["params"]
    z, report = compress_linen(params, uses=find_uses(Experts(), x))
    assert {row.path for row in report.tensors if row.format == "tca-tbe"} == {"a/kernel", "b/kernel", "c/kernel"}

    def f(z, x):
        with fused():
            return Experts().apply({"params": z}, x)

    assert targets(f, z, x) == {"jaxzip_tca_tbe_matmul"}
    y, want = f(z, x), Experts().apply({"params": params}, x)
    assert y.dtype == want.dtype and y.shape == want.shape
    assert_same(y, f(raw(z), x))
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.02)


class OwnUses(nn.Module):
    """Weights outside of the hooks of Flax's layers."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(128, 64, param_dtype=BF16)
        w = self.param("w", nn.initializers.normal(0.05, BF16), (64, 128))
        kernel = self.param("kernel", nn.initializers.normal(0.05, BF16), (64, 128))
        x = embed(ids)
        y = jnp.dot(x, w * 2 - w) + jnp.matmul(x, -w) + x @ w.T.T + jnp.take(w, ids, axis=0)
        y = y + jax.lax.dot_general(x, kernel, (((2,), (0,)), ((), ())))
        table = embed.embedding
        return y + jnp.dot(x, table.T) + x @ (2 * table).reshape(128, 64).transpose() + (table[ids] * 2).sum()


class OwnCall(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return jnp.dot(x, self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype))


class DoubledDense(nn.Dense):
    def __call__(self, x):
        return super().__call__(2 * x)


class DoubledEinsum(nn.Einsum):
    def __call__(self, x):
        return super().__call__(2 * x)


@pytest.mark.parametrize("with_uses", [False, True])
@pytest.mark.parametrize("with_fused", [False, True])
def test_weights_are_decoded_outside_of_the_hooks(with_uses, with_fused):
    options = {"use_bias": False, "param_dtype": BF16}
    x = jax.random.normal(jax.random.key(1), (3, 64), BF16)
    einsum = DoubledEinsum((64, 128), "bd,df->bf", **options)
    cases = [(OwnUses(), IDS), (OwnCall(128, **options), x), (DoubledDense(128, **options), x), (einsum, x)]
    for model, x in cases:
        params = jax.tree.map(lambda leaf: leaf.astype(BF16), model.init(jax.random.key(0), x)["params"])
        z, report = compress_linen(params, uses=find_uses(model, x) if with_uses else None)
        assert all(row.format == "tca-tbe" for row in report.tensors)
        with fused() if with_fused else contextlib.nullcontext():
            y, want = model.apply({"params": z}, x), model.apply({"params": params}, x)
        np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.02)


def test_arguments_of_layers_may_be_named():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(128, 64, param_dtype=BF16)
            x = nn.Dense(64, param_dtype=BF16)(inputs=embed(inputs=ids))
            x = nn.Einsum((64, 64), param_dtype=BF16)(inputs=x, einsum_str="btd,df->btf")
            return embed.attend(query=nn.DenseGeneral(64, param_dtype=BF16)(inputs=x))

    params = Named().init(jax.random.key(0), IDS)["params"]
    z, report = compress_linen(params, uses=find_uses(Named(), IDS))
    assert {row.format for row in report.tensors if len(row.shape) > 1} == {"tca-tbe"}

    def f(z):
        with fused():
            return Named().apply({"params": z}, IDS)

    assert_same(f(z), f(raw(z)))


def test_subclasses_draw_and_sow_inside_fused():
    class Noisy(nn.Dense):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            return super().__call__(x + jax.random.normal(self.make_rng("noise"), x.shape, x.dtype))

    class Inside(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Noisy(128, param_dtype=BF16)(x)

    x, keys = jnp.ones((3, 64), BF16), {"params": jax.random.key(0), "noise": jax.random.key(1)}
    params = Inside().init(keys, x)["params"]
    z, _ = compress_linen(params, uses=find_uses(Inside(), x))
    want = Inside().apply({"params": params}, x, rngs=keys, mutable="intermediates")
    with fused():
        got = Inside().apply({"params": z}, x, rngs=keys, mutable="intermediates")
    jax.tree.map(assert_same, got, want)


def test_fused_needs_no_uses():
    layer, x = nn.Dense(128, param_dtype=BF16), jnp.ones((3, 64), BF16)
    z, _ = compress_linen(layer.init(jax.random.key(0), x)["params"])

    def f(z, x):
        with fused():
            return layer.apply({"params": z}, x)

    assert targets(f, z, x) == {"jaxzip_tca_tbe_matmul"}


@pytest.mark.parametrize("kind, call", [(nn.WeightNorm, {}), (nn.SpectralNorm, {"update_stats": False})])
def test_wrappers_that_rewrite_parameters_keep_them_dense(kind, call):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(64, param_dtype=BF16)(x)
            return kind(nn.Dense(128, param_dtype=BF16))(x, **call)

    x = jnp.ones((3, 64), BF16)
    variables = Wrapped().init(jax.random.key(0), x)
    variables["params"] = params = jax.tree.map(lambda leaf: leaf.astype(BF16), variables["params"])
    z, report = compress_linen(params, uses=find_uses(Wrapped(), x))
    notes = {row.path: row.note for row in report.tensors if row.path.endswith("kernel")}
    assert notes == {"Dense_0/kernel": "", "Dense_1/kernel": f"nn.{kind.__name__} rewrites it"}
    run = lambda params: Wrapped().apply({**variables, "params": params}, x, mutable="batch_stats")[0]  # noqa: E731
    assert_same(run(z), run(params))
    with fused(), pytest.raises(TypeError, match=f"Dense_1/kernel: nn.{kind.__name__} .*find_uses"):
        run(compress_linen(params)[0])


def test_what_weight_norm_leaves_is_compressed():
    model = nn.WeightNorm(nn.Embed(128, 64, param_dtype=BF16))
    params = model.init(jax.random.key(0), IDS)["params"]  # Flax's variable_filter takes kernels only
    z, report = compress_linen(params, uses=find_uses(model, IDS))
    assert [row.format for row in report.tensors] == ["tca-tbe"]
    with fused():
        assert_same(model.apply({"params": z}, IDS), model.apply({"params": params}, IDS))


def test_a_bias_of_rank_2_is_no_kernel():
    class Projection(nn.Module):
        @nn.compact
        def __call__(self, x):
            bias = nn.initializers.normal(1.0)
            return nn.Einsum((64, 64, 64), "btd,dnh->btnh", param_dtype=BF16, bias_init=bias, name="a")(x)

    x = jax.random.normal(jax.random.key(1), (1, 2, 64), BF16)
    params = Projection().init(jax.random.key(0), x)["params"]
    for uses in (find_uses(Projection(), x), None):
        z, report = compress_linen(params, uses=uses)
        bias = next(row for row in report.tensors if row.path == "a/bias")
        assert bias.format == "raw" and "it is a bias" in bias.note
        with fused():
            y = Projection().apply({"params": z}, x)
        want = np.asarray(Projection().apply({"params": params}, x), np.float32)
        np.testing.assert_allclose(np.asarray(y, np.float32), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("axis", [0, -1])
def test_only_stacks_along_the_first_axis_are_compressed(axis):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(64, use_bias=False, param_dtype=BF16, name="up")(x) / 64, None

    model = nn.scan(Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=128)()
    x = jax.random.normal(jax.random.key(1), (2, 64), BF16)
    params = model.init(jax.random.key(0), x, None)["params"]
    z, report = compress_linen(params, uses=find_uses(model, x, None))
    assert (report.tensors[0].note == "") == (axis == 0)
    assert axis == 0 or "its stack axis is not the first" in report.tensors[0].note
    with fused():
        y, _ = model.apply({"params": z}, x, None)
    want = np.asarray(model.apply({"params": params}, x, None)[0], np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), want, rtol=0.05, atol=0.05)


def test_a_shape_that_does_not_fit_is_flax_s_error():
    z, _ = compress_linen(nn.Dense(128, param_dtype=BF16).init(jax.random.key(0), jnp.ones((1, 64)))["params"])
    with fused(), pytest.raises(Exception, match="shape"):
        nn.Dense(128, param_dtype=BF16).apply({"params": z}, jnp.ones((1, 65), BF16))


def test_a_traced_tree_is_refused():
    with pytest.raises(TypeError, match="kernel: compress_kernel .* compress outside of jit"):
        jax.jit(compress_linen)({"kernel": jnp.ones((64, 64), BF16)})


def test_a_rule_that_cannot_be_followed_names_the_leaf():
    with pytest.raises(TypeError, match="a/kernel.*float16"):
        compress_linen({"a": {"kernel": jnp.ones((64, 64), jnp.float16)}}, [jaxzip.CompressionRule(format="tca-tbe")])
