"""LlamaConfig: from Hugging Face, to JSON and back, and what it refuses."""

import dataclasses
import json

import pytest
from jaxzip.models import Llama3RopeScaling, LlamaConfig, UnsupportedConfigError

from jaxzip.errors import JaxzipError

LLAMA31 = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


def test_llama_31_8b():
    config = LlamaConfig.from_hf(LLAMA31)
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009) and config.dtype == "bfloat16"
    hash(config)


def test_transformers_5_names():
    hf = {key: value for key, value in LLAMA31.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    hf |= {"rope_parameters": {**LLAMA31["rope_scaling"], "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert LlamaConfig.from_hf(hf) == LlamaConfig.from_hf(LLAMA31)


def test_defaults_of_old_configs():
    hf = {key: LLAMA31[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = LlamaConfig.from_hf({**hf, "num_attention_heads": 32, "eos_token_id": 2})
    assert config.num_kv_heads == 32 and config.rope_theta == 10000.0 and config.eos_token_ids == (2,)


@pytest.mark.parametrize(
    "config", [LlamaConfig.from_hf(LLAMA31), LlamaConfig.from_hf({**LLAMA31, "rope_scaling": None})]
)
def test_json_round_trip(config):
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "type 'dynamic'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 5}, "num_heads=32 must be divisible by num_kv_heads=5"),
        ({"torch_dtype": "float64"}, "dtype is 'float64'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": "128"}, "config: hidden_size is '128', expected a positive integer"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rope_scaling": 5}, "rope_scaling is 5, expected an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "rope_scaling.factor is 'x', expected a positive"),
        ({"rms_norm_eps": "1e-5x"}, "rms_norm_eps is '1e-5x', expected a number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is ['</s>']"),
        ({"bos_token_id": [1]}, "bos_token_id is [1]"),
    ],
)
def test_refuses_by_name_and_value(change, message):
    with pytest.raises(UnsupportedConfigError) as error:
        LlamaConfig.from_hf({**LLAMA31, **change})
    assert message in str(error.value) and isinstance(error.value, JaxzipError)


def test_missing_and_unknown_keys():
    with pytest.raises(UnsupportedConfigError, match="'hidden_size' is missing"):
        LlamaConfig.from_hf({key: value for key, value in LLAMA31.items() if key != "hidden_size"})
    values = LlamaConfig.from_hf(LLAMA31).to_dict()
    with pytest.raises(UnsupportedConfigError, match="new_thing"):
        LlamaConfig.from_dict({**values, "new_thing": 1})
    del values["head_dim"]
    with pytest.raises(UnsupportedConfigError, match="head_dim"):
        LlamaConfig.from_dict(values)


def test_odd_head_dim():
    with pytest.raises(UnsupportedConfigError, match="head_dim=15"):
        dataclasses.replace(LlamaConfig.from_hf(LLAMA31), head_dim=15)
