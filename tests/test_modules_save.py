"""Compressed modules through jaxzip's checkpoints and through Orbax's own."""

import json

import jax
import jax.numpy as jnp
import modules_models as models
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxzip
from jaxzip import checkpoint
from jaxzip.checkpoint import layout
from jaxzip.errors import CheckpointError, TensorNotFoundError
from jaxzip.modules import (
    CompressedEmbed,
    CompressedKernel,
    KernelRule,
    restore_module,
    save_module,
    transcode_module,
)
from jaxzip.testing import all_bit_patterns, bits, gaussian_weights

BF16 = jnp.bfloat16
IDS = jnp.arange(12).reshape(2, 6)
STORED = nnx.Not(nnx.RngState)


class WithMore(nnx.Module):
    """A decoder, batch statistics, a weight of its own and one with every bit pattern in it."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.decoder = models.NnxDecoder(rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.w = nnx.Param(jnp.asarray(gaussian_weights((4, 64, 32), seed=3)))
        patterns = gaussian_weights((512, 512))
        patterns[:256, :256] = all_bit_patterns()
        self.patterns = nnx.Linear(512, 512, param_dtype=BF16, rngs=rngs)
        self.patterns.kernel.set_value(jnp.asarray(patterns))

    def __call__(self, ids):
        return self.decoder(ids)


def abstract():
    return nnx.eval_shape(lambda: WithMore(rngs=nnx.Rngs(0)))


def compressed():
    rules = [KernelRule("w", einsum="td,ndh->tnh"), *jaxzip.rules.DEFAULT_RULES]
    return jaxzip.compress_module(WithMore(rngs=nnx.Rngs(0)), rules)


def assert_same_state(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(nnx.state(model, STORED)) for model in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (_, x), (_, y) in zip(a, b):
        np.testing.assert_array_equal(bits(x), bits(y))


def test_save_and_restore(tmp_path):
    model = compressed()
    model.norm.mean.set_value(jnp.arange(8.0))
    save_module(model, tmp_path / "saved")
    again = restore_module(abstract(), tmp_path / "saved", format=None)
    assert_same_state(model, again)
    assert isinstance(again.decoder.embedder, CompressedEmbed) and isinstance(again.w.get_value(), CompressedKernel)
    run = nnx.jit(lambda model, ids: model(ids))
    np.testing.assert_array_equal(bits(run(again, IDS)), bits(run(model, IDS)))
    assert checkpoint.verify_checksums(tmp_path / "saved")
    rows = {row["path"]: row for row in checkpoint.inspect(tmp_path / "saved")["tensors"]}
    assert rows["decoder/layers/0/attention/query/kernel"]["format"] == "tca-tbe"
    assert rows["patterns/kernel"]["escapes"] > 1000 and rows["norm/mean"]["format"] == "raw"
    with pytest.raises(CheckpointError, match="exists"):
        save_module(model, tmp_path / "saved")


def test_a_compressed_model_takes_the_checkpoints_weights(tmp_path):
    def model(seed):
        return models.NnxDecoder(rngs=nnx.Rngs(seed))

    dense, small = model(0), jaxzip.compress_module(model(0))
    save_module(small, tmp_path / "small")
    save_module(dense, tmp_path / "dense")
    other = jaxzip.compress_module(model(7))
    again = restore_module(other, tmp_path / "small", format=None, batch_invariant=True)
    assert_same_state(again, small)
    assert again.embedder.options.batch_invariant and again.layers[0].mlp.up.dot_general.batch_invariant
    assert_same_state(other, jaxzip.compress_module(model(7)))  # it stays as it was
    again = restore_module(other, tmp_path / "dense")  # saved dense: comes back so
    assert_same_state(again, dense)
    np.testing.assert_array_equal(bits(again(IDS)), bits(dense(IDS)))
    wrong = jaxzip.compress_module(model(0))
    up = nnx.Linear(512, 256, use_bias=False, param_dtype=BF16, rngs=nnx.Rngs(0))
    wrong.layers[0].mlp.up = jaxzip.compress_module(up)
    with pytest.raises(ValueError, match=r"mlp/up/kernel: the model has bfloat16\[512, 256\]"):
        restore_module(wrong, tmp_path / "small")


def test_paths_may_go_up(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    model = jaxzip.compress_module(nnx.Linear(128, 128, param_dtype=BF16, rngs=nnx.Rngs(0)))
    for path in (tmp_path / "x" / ".." / "m", "../n"):
        save_module(model, path)
        structure = nnx.eval_shape(lambda: nnx.Linear(128, 128, param_dtype=BF16, rngs=nnx.Rngs(0)))
        assert_same_state(restore_module(structure, path, format=None), model)
        with pytest.raises(CheckpointError, match="exists"):
            save_module(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "n", "x"]


def test_keys_of_dicts_may_be_names_of_their_methods(tmp_path):
    class InDict(nnx.Module):
        def __init__(self, *, rngs):
            kinds = ("items", "keys", "values", "a/b")
            self.layers = nnx.data({kind: nnx.Linear(64, 128, param_dtype=BF16, rngs=rngs) for kind in kinds})

    small = jaxzip.compress_module(InDict(rngs=nnx.Rngs(0)))
    assert isinstance(small.layers["items"].kernel.get_value(), CompressedKernel)
    save_module(small, tmp_path / "saved")
    structure = nnx.eval_shape(lambda: InDict(rngs=nnx.Rngs(0)))
    assert_same_state(restore_module(structure, tmp_path / "saved"), small)


def test_restore_in_another_format(tmp_path):
    save_module(compressed(), tmp_path / "saved")
    again = restore_module(abstract(), tmp_path / "saved", format="lane-planar")
    assert_same_state(again, transcode_module(compressed(), "lane-planar"))


def test_a_raw_control_is_saved_as_plain_arrays(tmp_path):
    save_module(transcode_module(compressed(), "raw"), tmp_path / "saved")
    again = restore_module(abstract(), tmp_path / "saved")
    assert_same_state(again, WithMore(rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("pure", [False, True], ids=["state", "pure dict"])
def test_a_converted_checkpoint_of_the_dense_state(tmp_path, pure):
    model = models.NnxDecoder(rngs=nnx.Rngs(0))
    state = nnx.state(model, STORED)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "dense", nnx.to_pure_dict(state) if pure else state)
    checkpoint.convert(tmp_path / "dense", tmp_path / "converted")
    structure = nnx.eval_shape(lambda: models.NnxDecoder(rngs=nnx.Rngs(1)))
    assert_same_state(restore_module(structure, tmp_path / "converted", format=None), jaxzip.compress_module(model))
    dense = restore_module(structure, tmp_path / "converted", rules=[], format=None)
    assert isinstance(dense.layers[0].mlp.up.kernel.get_value(), CompressedKernel)  # as the checkpoint has it
    assert isinstance(dense.layers[0].attention.query.kernel.get_value(), CompressedKernel)  # as a matrix


def test_a_converted_stack_along_the_last_axis_is_decoded(tmp_path):
    @nnx.split_rngs(splits=128)
    @nnx.vmap(in_axes=(0,), out_axes=-1)
    def stacked(rngs):
        return nnx.Linear(4, 256, param_dtype=BF16, rngs=rngs)

    model = stacked(nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "dense", nnx.state(model, STORED))
    checkpoint.convert(tmp_path / "dense", tmp_path / "converted")
    rows = {row["path"]: row for row in checkpoint.inspect(tmp_path / "converted")["tensors"]}
    assert rows["kernel/value"]["format"] == "tca-tbe"
    structure = nnx.eval_shape(lambda: stacked(nnx.Rngs(0)))
    assert_same_state(restore_module(structure, tmp_path / "converted"), model)


def test_a_layer_that_contracts_other_axes_gets_its_own_layout(tmp_path):
    def einsum(equation):
        return nnx.Einsum(equation, (64, 128, 64), param_dtype=BF16, rngs=nnx.Rngs(0))

    model = einsum("td,ndh->tnh")
    save_module(jaxzip.compress_module(model), tmp_path / "saved")
    for equation, contract in (("td,ndh->tnh", (1,)), ("tn,ndh->tdh", (0,))):
        kernel = restore_module(nnx.eval_shape(lambda: einsum(equation)), tmp_path / "saved").kernel.get_value()  # noqa: B023
        assert kernel.axes.contract == contract
        np.testing.assert_array_equal(bits(kernel.dense()), bits(model.kernel.get_value()))


def test_orbax_saves_and_restores_the_state_itself(tmp_path):
    model = compressed()
    state = nnx.state(model, STORED)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "native", state)
        again = checkpointer.restore(tmp_path / "native", jax.eval_shape(lambda: state))
    other = compressed()
    nnx.update(other, again)
    assert_same_state(model, other)


class Counter(nnx.Module):
    """A weight and a variable that holds ``value``."""

    def __init__(self, value=None):
        self.w = nnx.Param(np.array([1 / 3]))
        self.count = nnx.Variable(value)


def test_64_bits_come_back_as_they_were(tmp_path):
    model = Counter(np.array([2**40]))
    save_module(model, tmp_path / "saved")
    again = restore_module(model, tmp_path / "saved")
    assert again.count.get_value().tolist() == [2**40] and again.w.get_value().tolist() == [1 / 3]
    with pytest.raises(ValueError, match="float32.*float64.*jax_enable_x64"):
        restore_module(nnx.eval_shape(lambda: model), tmp_path / "saved")


@pytest.mark.parametrize("value", [3, 2.5, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_numbers_come_back_as_numbers(tmp_path, value, abstract):
    model = Counter(value)
    model.w.set_value(jnp.ones(3))
    save_module(model, tmp_path / "saved")
    structure = nnx.eval_shape(lambda: model) if abstract else model
    again = restore_module(structure, tmp_path / "saved").count.get_value()
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    ("value", "words"),
    [(jax.random.key(0), "PRNG key.*key_data"), (None, "NoneType"), ("a", "str"), ((1, 2), "tuple"), (2**70, "object")],
)
def test_what_cannot_be_saved_is_named_and_leaves_nothing(tmp_path, value, words):
    with pytest.raises(TypeError, match=f"^count: save_module.*{words}"):
        save_module(Counter(value), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_errors(tmp_path):
    save_module(compressed(), tmp_path / "saved")
    with pytest.raises(TensorNotFoundError, match="embedder/embedding.*did you mean decoder/embedder"):
        restore_module(nnx.eval_shape(lambda: models.NnxDecoder(rngs=nnx.Rngs(0))), tmp_path / "saved")
    wrong = abstract()
    wrong.patterns = nnx.eval_shape(lambda: nnx.Linear(512, 256, param_dtype=BF16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"patterns/.* the model has bfloat16\[.*256\]"):
        restore_module(wrong, tmp_path / "saved")
    wrong.patterns = nnx.eval_shape(lambda: nnx.Linear(512, 512, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the model has float32"):
        restore_module(wrong, tmp_path / "saved")


def test_what_is_no_module_is_refused(tmp_path):
    for tree in ({"step": 1}, nnx.split(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))):  # the second would be saved as "1/kernel"
        with pytest.raises(TypeError, match="save_module: expected an nnx.Module, got (dict|tuple)"):
            save_module(tree, tmp_path / "saved")
    assert not any(tmp_path.iterdir())
    save_module(nnx.state(compressed(), STORED), tmp_path / "state")
    assert_same_state(restore_module(abstract(), tmp_path / "state"), compressed())
    with pytest.raises(TypeError, match="restore_module: expected an nnx.Module, got dict"):
        restore_module({}, tmp_path / "state")


@pytest.mark.parametrize("axes", [{"shape": [64], "contract": [0]}, {"shape": [8, 8, 8], "contract": [0]}, {"no": [1]}])
def test_axes_that_do_not_fit_are_found(tmp_path, axes):
    save_module(compressed(), tmp_path / "saved")
    file = tmp_path / "saved" / layout.CHECKPOINT_FILE
    whole = json.loads(file.read_text())
    document = whole["custom_metadata"]["jaxzip"]
    next(entry for entry in document["tensors"] if entry["path"] == ["w"])["kernel_axes"] = axes
    whole["custom_metadata"] = layout.custom_metadata(document)
    file.write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="w in .*axes"):
        restore_module(abstract(), tmp_path / "saved")
