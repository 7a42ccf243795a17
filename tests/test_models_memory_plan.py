"""The memory plan: its cache is the program's, its figures add up, and the command that prints it."""

import dataclasses
import json

import jax
import pytest
from jaxzip.ffi import cuda_backend
from jaxzip.models import LlamaConfig, memory_plan, random_params
from jaxzip.models.cache import KVCache
from jaxzip.models.memory_plan import PREFILL_ROWS, RUNTIME_BYTES, cache_slots, largest
from test_cli import converted, run, source  # noqa: F401 - fixtures

import jaxzip
from jaxzip.checkpoint import open_checkpoint
from jaxzip.checkpoint.format_sizes import format_sizes
from jaxzip.cli.plan import parse_bytes

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_position_embeddings=131072,
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cache_is_the_programs(dtype):
    config = dataclasses.replace(LLAMA_8B, dtype=dtype, num_layers=3)
    _, slots = cache_slots(500, 200)
    cache = jax.eval_shape(lambda: KVCache.empty(config, jax.numpy.zeros(6, "int32"), slots))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*cache.keys, *cache.values))
    assert memory_plan(config, 0, 6, 500, 200, format=None).cache == size


# Bytes of temporaries that XLA 0.11.2 gave prefill, compiled for an H200, without cuBLAS' workspace. Compressed weights
# are decoded from 16385 rows on. 10 MB are 0.1% of the weights.
@pytest.mark.parametrize(
    ("batch", "prompt", "compressed", "temporary"),
    [
        (1, 512, False, 61e6), (8, 512, False, 488e6), (64, 512, False, 3901e6),
        (1, 512, True, 49e6), (1, 1024, True, 47e6), (1, 2048, True, 93e6), (1, 8192, True, 373e6),
        (64, 512, True, 3909e6),
    ],
)  # fmt: skip
def test_working_memory_is_near_the_compilers(batch, prompt, compressed, temporary):
    planned = memory_plan(LLAMA_8B, 0, batch, prompt, 256, format="lane-planar" if compressed else None).working
    assert abs(planned - temporary) < 0.05 * temporary + 10e6


# The same of narrower feed-forward networks, so that attention has the most.
@pytest.mark.parametrize(("prompt", "temporary"), [(512, 15e6), (4096, 120e6), (8192, 239e6)])
def test_working_memory_where_attention_has_the_most(prompt, temporary):
    narrow = dataclasses.replace(LLAMA_8B, intermediate_size=4096)
    planned = memory_plan(narrow, 0, 1, prompt, 256, format="lane-planar").working
    assert abs(planned - temporary) < 0.05 * temporary


def test_few_rows_need_no_scratch():
    assert PREFILL_ROWS == cuda_backend.FUSED_ROWS["lane-planar"]
    few, many = (memory_plan(LLAMA_8B, 0, batch, 512, 16, format="lane-planar").working for batch in (32, 33))
    assert few < memory_plan(LLAMA_8B, 0, 32, 512, 16, format=None).working
    assert many > 33 / 32 * few + 2 * 4096 * 2 * 14336


def test_other_formats_are_decoded_for_prompts():
    """Of few rows the largest decoded weight is nearly all there is; of many it comes on top of what is multiplied."""
    weight = 2 * 4096 * 2 * 14336
    for prompt, rows in ((64, 64), (2048, 2048)):
        plans = [memory_plan(LLAMA_8B, 0, 1, prompt, 16, format=of).working for of in ("tca-tbe", "lane-planar")]
        assert weight < plans[0] - rows * 2 * (2 * 14336 + 4096) and plans[1] < plans[0] - weight / 2


def test_what_fits():
    plan = memory_plan(LLAMA_8B, 16 << 30, 1, 512, 256, format=None)
    assert plan.total == plan.weights + plan.cache + plan.working
    assert plan.fits(plan.total + RUNTIME_BYTES) and not plan.fits(plan.total + RUNTIME_BYTES - 1)
    assert [largest(lambda n: n <= most, 1000) for most in (0, 1, 37, 1000, 5000)] == [0, 1, 37, 1000, 1000]


def test_estimated_sizes_are_near_those_of_encoded_weights(tmp_path):
    config = dataclasses.replace(LLAMA_8B, vocab_size=700, hidden_size=512, intermediate_size=1000, num_layers=1)
    params = random_params(dataclasses.replace(config, num_heads=8, head_dim=64))
    jaxzip.checkpoint.convert(_orbax(params, tmp_path / "source"), tmp_path / "packed")
    sizes = format_sizes(open_checkpoint(tmp_path / "packed"))
    assert sizes["as stored"] < sizes["lane-planar"] < sizes["dense"]
    tree = open_checkpoint(tmp_path / "packed").load_tree(format="lane-planar", on_host=True)
    assert abs(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / sizes["lane-planar"] - 1) < 0.05


def _orbax(params, path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as saver:
        saver.save(path, jax.tree.map(jax.numpy.asarray, params))
    return path


def test_command(converted):  # noqa: F811
    options = ("--plan", "--memory", "2GiB", "--context", 24, "--new-tokens", 4, "--batch", 3)
    table = run("inspect", converted, *options)
    assert table.exit_code == 0, table.output
    assert "dense" in table.stdout and "as stored" in table.stdout and "yes" in table.stdout
    data = json.loads(run("inspect", converted, *options, "--json").stdout)
    assert data["memory"] == 2 << 30 and data["batch"] == 3
    dense, stored, _ = data["plan"]
    assert stored["weight_bytes"] < dense["weight_bytes"] and dense["fits"]
    total = sum(row["original_bytes"] for row in json.loads(run("inspect", converted, "--json").stdout)["tensors"])
    assert dense["weight_bytes"] == total
    assert min(row["most_sequences"] for row in data["plan"]) >= 3 and dense["longest_context"] == 32
    default = run("inspect", converted, "--plan", "--memory", "2GiB")
    assert "1 x 32 tokens (more the model does not take), 31 of them new" in default.stdout
    nothing = json.loads(run("inspect", converted, "--plan", "--memory", 0, "--json").stdout)
    assert nothing["context"] == 32
    assert [(row["most_sequences"], row["longest_context"]) for row in nothing["plan"]] == 3 * [(0, 0)]
    small = json.loads(run("inspect", converted, *options, "--json", "--memory", "1GiB").stdout)
    assert not small["plan"][0]["fits"] and small["plan"][0]["most_sequences"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory", "many"), "141GB"),
        (("--memory", "1GB", "--batch", 0), "--batch is 0"),
        (("--memory", "1GB", "--context", 8, "--new-tokens", 8), "--new-tokens is 8"),
        (("--memory", "1GB", "--context", 33), "--context is 33, but"),
        (("--memory", "1GB", "--context", 1), "--context is 1, expected 2 or more"),
        (("--memory", f"{10**300}TB"), "--memory '1000"),
        (("--memory", "1GB", "--batch", 10**400), "--batch"),
        ((), "--memory 141GB"),
    ],
)
def test_command_refuses(converted, options, words):  # noqa: F811
    result = run("inspect", converted, "--plan", *options)
    assert result.exit_code != 0 and words in (result.stderr + str(result.exception))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--memory", "141GB"), "--memory"),
        (("--context", 24, "--batch", 3), "--context and --batch"),
        (("--new-tokens", 4), "--new-tokens"),
    ],
)
def test_options_of_a_plan_need_one(converted, options, names):  # noqa: F811
    result = run("inspect", converted, *options)
    assert result.exit_code == 1 and f"{names}: only what --plan shows" in " ".join(result.stderr.split())


@pytest.mark.parametrize(("text", "count"), [("141GB", 141e9), ("80 GiB", 80 << 30), ("7", 7), ("1.5kb", 1500)])
def test_sizes_in_words(text, count):
    assert parse_bytes(text) == count
