"""Flax transformers whose weights may be dense or compressed, generation, and tokenizers.

    config      LlamaConfig: what a checkpoint's metadata stores        execution   how operations are to be computed
    layers      Linear, Embedding, RMSNorm: the only places that touch weights
    rope, attention, llama                one block of the network each; llama.Llama is the model
    decode_attention, rms_norm            kernels for few rows on a GPU
    fuse        q, k and v, and gate and up, as one weight each
    params      plain nested dicts in and out of a model      init  random weights for tests and benchmarks
    cache       KVCache, static shapes      sampling  logits to a token      generate  the loop under one jit
    memory_plan what that takes of a device's memory
    loading     a model and its tokenizer from a compressed checkpoint
    tokenizer   text to ids and back        tokenizer_gguf  tokenizer.json from GGUF metadata

    prompts ─► pad left ─► prefill ─► sample ─► while not all done: decode one token, sample ─► tokens
                              └────────────── KVCache ──────────────┘

Example::

    model, tokenizer = load_model("smollm2-jaxzip")    # or Llama.from_params(config, params), dense or compressed
    out = generate(model, [tokenizer.encode("Hello")], max_new_tokens=32)
    print(tokenizer.decode(out.sequences()[0]))
"""

from jaxzip.models.cache import KVCache
from jaxzip.models.config import Llama3RopeScaling, LlamaConfig, UnsupportedConfigError
from jaxzip.models.fuse import fuse_projections
from jaxzip.models.generate import Generation, generate, stream
from jaxzip.models.init import random_params
from jaxzip.models.llama import Llama
from jaxzip.models.loading import load_model
from jaxzip.models.memory_plan import MemoryPlan, memory_plan
from jaxzip.models.sampling import GREEDY, Sampling
from jaxzip.models.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "GREEDY",
    "Generation",
    "KVCache",
    "Llama",
    "Llama3RopeScaling",
    "LlamaConfig",
    "MemoryPlan",
    "Sampling",
    "StreamDecoder",
    "Tokenizer",
    "UnsupportedConfigError",
    "fuse_projections",
    "generate",
    "load_model",
    "memory_plan",
    "random_params",
    "stream",
]
