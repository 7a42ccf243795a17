"""Makes the fixtures beside it: tiny random models, their logits and greedy tokens, by Hugging Face transformers.

    pip install torch transformers        (on the CPU; jaxzip is not needed)
    python tests/data/oracle/make.py      all families, or those that are named

Each family's folder holds what ``save_pretrained`` writes (config.json, safetensors, some sharded, weights in bf16,
fp16 or fp32) and expected.npz: logits of ``PROMPTS[0]`` and the greedy tokens after each prompt, computed in fp32.
"""

import json
import pathlib
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 64
#: Of different lengths, and longer than the windows.
PROMPTS = ([5, 17, 3, 88, 41, 2, 60, 9, 77, 30, 31, 12, 4, 95, 66, 21], [50, 1, 94, 7, 7, 13])
#: Between the two most likely tokens, at every step: far above what another order of sums changes.
LEAST_MARGIN = 2e-3
#: Tokens that a model must not fall short of: one that repeats itself shows little.
LEAST_DISTINCT = 8

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 24}
#: What each family adds to SIZES, the dtype of its weights and the size of its files.
FAMILIES = {
    "llama": ({"rope_parameters": LLAMA3, "tie_word_embeddings": True}, "float16", "60KB"),
    "mistral": ({"sliding_window": 8}, "bfloat16", "5GB"),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "bfloat16", "60KB"),
    "qwen3": ({"head_dim": 32, "tie_word_embeddings": True}, "float32", "5GB"),
    "gemma2": ({**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}, "bfloat16", "5GB"),
    "gemma3_text": (
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            },
        },
        "bfloat16",
        "5GB",
    ),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "bfloat16", "5GB"),
    "qwen3_moe": (
        {
            "num_hidden_layers": 3, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
            "norm_topk_prob": True, "mlp_only_layers": [1],
        },
        "bfloat16",
        "150KB",
    ),
}  # fmt: skip


def build(family: str, seed: int):
    """A model of ``family`` with random weights that its dtype holds, in fp32."""
    import torch
    import transformers

    changes, dtype, _ = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                one = float("gemma" not in family and not name.endswith("bias"))  # Gemma's norms add one
                if name == "model.norm.weight" and "gemma" in family:
                    one = noise.sign() - 1  # or the head, which is the embedding, gives each token again
                value = one + 0.2 * noise
            else:
                value = noise * 1.5 / p.shape[-1] ** 0.5
            p.copy_(value.to(getattr(torch, dtype)).float())
    return model


def save(model, family: str, directory: pathlib.Path) -> None:
    """Writes ``model`` as Hugging Face does, its weights in the family's dtype."""
    import copy

    import torch

    _, dtype, shard = FAMILIES[family]
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)


def expected(model) -> dict[str, np.ndarray] | None:
    """Logits of the first prompt and greedy tokens after each, without a cache; ``None``: a step is near a tie."""
    import torch

    found, margin = {}, np.inf
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            tokens = list(prompt)
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
                if len(tokens) == len(PROMPTS[0]) and i == 0:
                    found["logits"] = logits.numpy()
                best = torch.topk(logits[-1], 2)
                margin = min(margin, float(best.values[0] - best.values[1]))
                if margin < LEAST_MARGIN:
                    return None
                tokens.append(int(best.indices[0]))
            found[f"tokens_{i}"] = np.array(tokens[len(prompt) :], np.int32)
    return found | {"margin": np.float32(margin)}


def model_with_margin(family: str, seed: int):
    """A random model of ``family`` and what is expected of it, from the first seed that gives the margin."""
    while True:
        model = build(family, seed)
        found = expected(model)
        if found is not None and len(set(found["tokens_0"].tolist())) >= LEAST_DISTINCT:
            return model, found
        print(f"{family}: seed {seed} does not do", flush=True)
        seed += 1


def main(families: list[str]) -> None:
    import torch
    import transformers

    for family in families or FAMILIES:
        directory = HERE / family
        shutil.rmtree(directory, ignore_errors=True)
        model, found = model_with_margin(family, seed=0)
        save(model, family, directory)
        np.savez_compressed(directory / "expected.npz", **found)
        (directory / "made_by.json").write_text(
            json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}) + "\n"
        )
        size = sum(f.stat().st_size for f in directory.iterdir())
        print(f"{family}: {size} bytes, margin {found['margin']:.4f}, {len(set(found['tokens_0'].tolist()))} tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
