"""What bench/generate.py's models take in Hugging Face transformers: bf16, static cache, its own torch.compile.

Weights are random: speed does not depend on them. Run it beside bench/generate.py, on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

import harness
from generate_models import MODELS


def hf_config(config, layers: int):
    """transformers' configuration of a Llama or Qwen3 of these shapes, with ``layers`` layers."""
    from transformers import LlamaConfig, Qwen3Config

    kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config}
    if config.model_type not in kinds:
        raise SystemExit(f"{config.model_type}: only {', '.join(kinds)} are compared")
    return kinds[config.model_type](
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=config.max_position_embeddings, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def build(config, layers: int, device: str):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config(config, layers), dtype=torch.bfloat16)
    return model.eval()


def seconds(model, ids, new: int, repeats: int) -> float:
    """Median wall time of generating ``new`` tokens a row, greedily, after two runs that compile."""
    import torch

    synchronize = torch.cuda.synchronize if ids.is_cuda else (lambda: None)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "cache_implementation": "static"}
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            synchronize()
            start = time.perf_counter()
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            synchronize()
            times.append(time.perf_counter() - start)
            assert found.shape == (ids.shape[0], ids.shape[1] + new)
    return statistics.median(times[2:])


def measure(model, batch: int, prompt: int, new: int, repeats: int) -> dict:
    import torch

    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    first, both = seconds(model, ids, 1, repeats), seconds(model, ids, new, repeats)
    step = (both - first) / (new - 1)
    row = {"batch": batch, "ms per step": step * 1e3, "tokens/s": batch / step, "ms to first token": first * 1e3}
    return row | ({"peak bytes": torch.cuda.max_memory_allocated()} if ids.is_cuda else {})


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--layers", type=int, help="fewer than the model has; a step's time is that of these")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="generate_transformers", help="of the file under bench/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    config = MODELS[args.model]
    layers = args.layers or config.num_layers
    model, rows = build(config, layers, "cuda"), []
    for batch in args.batches:
        rows.append(
            {"model": args.model, "layers": layers, **measure(model, batch, args.prompt, args.new, args.repeats)}
        )
        path = harness.write_result(
            args.name,
            {
                "setup": {
                    "prompt": args.prompt, "new tokens": args.new, "torch": torch.__version__,
                    "transformers": transformers.__version__, "cache": "static, as generate compiles it by itself",
                    "ms per step": "(time of all tokens - time of the first) / (tokens - 1), medians",
                },
                "rows": rows,
            },
        )  # fmt: skip
    harness.show(f"Hugging Face transformers, {torch.cuda.get_device_name()}", rows)
    print(path)


if __name__ == "__main__":
    main()
