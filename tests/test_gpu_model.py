"""A whole model on a Hopper GPU: compressed weights give the bits of ``raw`` ones through the same kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import Llama, LlamaConfig, generate, random_params

import jaxzip

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=256, intermediate_size=640, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=32,
    max_position_embeddings=256, dtype="bfloat16",
)  # fmt: skip
TOKENS = [[5, 17, 3, 88, 41, 2, 60], [400, 1, 2, 3, 4, 5, 6]]


def model(config, params, format):
    def compress(path, w):
        axis = -2 if "embedding" in jax.tree_util.keystr(path) else -1
        return jaxzip.compress(w, format=format, output_axis=axis) if w.ndim == 2 else w

    return Llama.from_params(config, jax.tree_util.tree_map_with_path(compress, params), implementation="ffi")


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_tokens_equal_those_of_the_raw_control(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = random_params(config)
    encoded, raw = (model(config, params, format) for format in ("lane-planar", "raw"))
    assert encoded.to_params()["layers"]["0"]["mlp"]["up_proj"]["kernel"].format == "lane-planar"
    run = jax.jit(Llama.__call__)
    logits = run(encoded, jnp.array(TOKENS))
    assert np.isfinite(np.asarray(logits, np.float32)).all()
    assert np.asarray(logits).tobytes() == np.asarray(run(raw, jnp.array(TOKENS))).tobytes()
    tokens = generate(encoded, TOKENS, max_new_tokens=24).sequences()
    assert tokens == generate(raw, TOKENS, max_new_tokens=24).sequences()
    assert tokens == generate(encoded, TOKENS, max_new_tokens=24).sequences()
