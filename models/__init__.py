"""Flax transformers whose weights may be dense or compressed, generation, and tokenizers.

    config      DecoderConfig: sizes and constants      hf_values   what a Hugging Face config says, checked
    execution   how operations are to be computed
    layers      Linear, Stack, Embedding, RMSNorm: the only places that touch weights
    rope, attention, mlp, moe             one block of the network each
    decoder     what all families share: embedding, the loop over layers, head
    llama, mistral, qwen2, qwen3, gemma2, gemma3, mixtral, qwen3_moe    a family each: configuration, layer, class
    families    which class a configuration is for
    decode_attention, rms_norm            kernels for few rows on a GPU      prefill_attention  whole prompts, by cuDNN
    decode_chain                          a layer's kernels in one call there, from its attention to the next one's
    fuse        q, k and v, and gate and up, as one weight each
    params      plain nested dicts in and out of a model      init  random weights for tests and benchmarks
    cache       KVCache, static shapes      sampling  logits to a token      generate  the loop under one jit
    memory_plan what that takes of a device's memory
    loading     a model and its tokenizer from a compressed checkpoint      gemma_orbax  Gemma's own trees
    tokenizer   text to ids and back        tokenizer_gguf  tokenizer.json from GGUF metadata

    prompts ─► pad left ─► prefill ─► sample ─► while not all done: decode one token, sample ─► tokens
                              └────────────── KVCache ──────────────┘

Example::

    model, tokenizer = load_model("smollm2-jaxzip")    # or Llama.from_params(config, params), dense or compressed
    out = generate(model, [tokenizer.encode("Hello")], max_new_tokens=32)
    print(tokenizer.decode(out.sequences()[0]))
"""

from jaxzip.models.cache import KVCache
from jaxzip.models.config import (
    DecoderConfig,
    LinearRopeScaling,
    Llama3RopeScaling,
    LlamaConfig,
    UnsupportedConfigError,
)
from jaxzip.models.decoder import Decoder
from jaxzip.models.families import FAMILIES, config_from_hf, family_of
from jaxzip.models.fuse import fuse_projections
from jaxzip.models.gemma2 import Gemma2, Gemma2Config
from jaxzip.models.gemma3 import Gemma3, Gemma3Config
from jaxzip.models.generate import Generation, generate, stream
from jaxzip.models.init import random_params
from jaxzip.models.llama import Llama
from jaxzip.models.loading import load_model
from jaxzip.models.memory_plan import MemoryPlan, memory_plan
from jaxzip.models.mistral import Mistral, MistralConfig
from jaxzip.models.mixtral import Mixtral, MixtralConfig
from jaxzip.models.qwen2 import Qwen2, Qwen2Config
from jaxzip.models.qwen3 import Qwen3, Qwen3Config
from jaxzip.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from jaxzip.models.sampling import GREEDY, Sampling
from jaxzip.models.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "FAMILIES",
    "GREEDY",
    "Decoder",
    "DecoderConfig",
    "Gemma2",
    "Gemma2Config",
    "Gemma3",
    "Gemma3Config",
    "Generation",
    "KVCache",
    "LinearRopeScaling",
    "Llama",
    "Llama3RopeScaling",
    "LlamaConfig",
    "MemoryPlan",
    "Mistral",
    "MistralConfig",
    "Mixtral",
    "MixtralConfig",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Moe",
    "Qwen3MoeConfig",
    "Sampling",
    "StreamDecoder",
    "Tokenizer",
    "UnsupportedConfigError",
    "config_from_hf",
    "family_of",
    "fuse_projections",
    "generate",
    "load_model",
    "memory_plan",
    "random_params",
    "stream",
]
