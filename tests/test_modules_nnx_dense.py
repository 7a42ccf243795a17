"""compress_module on NNX layers whose weights stay dense, and why."""

import jax
import jax.numpy as jnp
import modules_models as models
import pytest
from flax import nnx
from modules_checks import assert_same, lowered, targets

import jaxzip
from jaxzip.modules import (
    CompressedEmbed,
    CompressedKernel,
    KernelRule,
    compress_with_report,
)

BF16 = jnp.bfloat16
IDS = jax.random.randint(jax.random.key(3), (2, 7), 0, models.VOCAB)


def test_stacks_along_another_axis_stay_dense():
    def stacked(make, axis):
        return nnx.split_rngs(splits=64)(nnx.vmap(make, in_axes=(0,), out_axes=axis))(nnx.Rngs(0))

    def block(rngs):
        options = {"param_dtype": BF16, "rngs": rngs}
        return nnx.List([
            nnx.Linear(128, 64, **options),
            nnx.LinearGeneral(128, (2, 64), **options),
            nnx.Einsum("td,ndh->tnh", (2, 128, 64), **options),
            nnx.Embed(128, 64, **options),
        ])  # fmt: skip

    last = stacked(block, -1)
    z, report = compress_with_report(last)
    notes = {row.path: row.note for row in report.tensors}
    for name in ("0/kernel", "1/kernel", "2/kernel", "3/embedding"):
        assert "its stack axis is not the first" in notes[name]
    x = jax.random.normal(jax.random.key(2), (2, 128), BF16)
    scan = nnx.scan(lambda y, layer: y + layer(x), in_axes=(nnx.Carry, -1), out_axes=nnx.Carry)
    zero = jnp.zeros((2, 64), BF16)
    assert_same(scan(zero, z[0]), scan(zero, last[0]))
    first = jaxzip.compress_module(stacked(block, 0))
    assert isinstance(first[0].kernel.get_value(), CompressedKernel) and isinstance(first[3], CompressedEmbed)


def test_layers_that_have_hooks_of_their_own_stay_dense():
    class Own(nnx.Module):
        def __init__(self, rngs):
            options = {"param_dtype": BF16, "rngs": rngs}
            self.a = nnx.Linear(64, 64, dot_general=lambda *args, **options: jax.lax.dot_general(*args), **options)
            self.b = nnx.LinearGeneral(64, 64, dot_general_cls=lambda: jax.lax.dot_general, **options)
            self.c = nnx.Einsum("bd,df->bf", (64, 64), promote_dtype=lambda args, dtype=None: args, **options)
            self.d = nnx.Conv(64, 64, (3,), **options)
            self.e = nnx.Einsum("bd,bd->b", (64, 64), **options)

    model, report = compress_with_report(Own(nnx.Rngs(0)))
    notes = {row.path: row.note for row in report.tensors if row.path.endswith("kernel")}
    assert "dot_general of its own" in notes["a/kernel"] and "dot_general_cls" in notes["b/kernel"]
    assert "promote_dtype of its own" in notes["c/kernel"] and "no layer of Flax" in notes["d/kernel"]
    assert "product of matrices" in notes["e/kernel"]
    assert not any(isinstance(leaf, CompressedKernel) for leaf in jax.tree.leaves(nnx.state(model)))


class OwnCall(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel + jnp.dot(x, self.kernel[...]) * (self.kernel * 2).sum()


class OwnCallByHooks(nnx.Linear):
    def __call__(self, x):
        return super().__call__(2 * x)


def test_subclasses_with_a_call_of_their_own_stay_dense():
    x, options = jax.random.normal(jax.random.key(0), (3, 64), BF16), {"param_dtype": BF16, "rngs": nnx.Rngs(0)}
    for kind in (OwnCall, OwnCallByHooks):
        model = kind(64, 128, **options)
        z, report = compress_with_report(model)
        note = next(row.note for row in report.tensors if row.path == "kernel")
        assert f"{kind.__name__} has a __call__ of its own" in note and "KernelRule" in note
        assert_same(z(x), model(x))
    z = jaxzip.compress_module(model, [KernelRule("kernel", einsum="bk,km->bm")])
    assert isinstance(z.kernel.get_value(), CompressedKernel) and targets(lowered(z, x)) == {"jaxzip_tca_tbe_matmul"}
    plain = type("Plain", (nnx.Linear,), {})(64, 128, **options)  # Flax's __call__
    assert isinstance(jaxzip.compress_module(plain).kernel.get_value(), CompressedKernel)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # Flax's SpectralNorm of bf16
@pytest.mark.parametrize("kind", [nnx.WeightNorm, nnx.SpectralNorm])
def test_wrappers_that_rewrite_parameters_keep_them_dense(kind):
    model = kind(nnx.Linear(64, 128, param_dtype=BF16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    z, report = compress_with_report(model)
    row = next(row for row in report.tensors if row.path == "layer_instance/kernel")
    assert row.note == f"nnx.{kind.__name__} rewrites it"
    x = jax.random.normal(jax.random.key(0), (3, 64), BF16)
    assert_same(z(x), nnx.clone(model)(x))


def test_what_weight_norm_leaves_is_compressed():
    model = nnx.WeightNorm(nnx.Embed(128, 64, param_dtype=BF16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    z = jaxzip.compress_module(model)  # Flax's variable_filter takes kernels only
    assert isinstance(z.layer_instance, CompressedEmbed)
    assert_same(z(IDS), model(IDS))
