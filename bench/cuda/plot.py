"""Geometric means and plot of results/hopper_lane_planar.json: ratio to cuBLAS against N, a line a shape."""

import json
import pathlib
import statistics

import matplotlib.pyplot as plt

RESULT = pathlib.Path(__file__).resolve().parent.parent / "results" / "hopper_lane_planar.json"
LARGE = 50e6


def best_rows() -> dict[tuple[int, int, int], dict]:
    """The faster of the two kernels for every (M, K, N), real exponents."""
    best: dict[tuple[int, int, int], dict] = {}
    for row in json.loads(RESULT.read_text())["rows"]:
        key = row["m"], row["k"], row["n"]
        if row["weights"] == "real" and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    return best


def main() -> None:
    best = best_rows()
    ratio = {key: row["cublas_us"] / row["us"] for key, row in best.items()}
    for name, large in (("M*K >= 50M", True), ("smaller", False)):
        for n in sorted({key[2] for key in best}):
            found = [r for (m, k, of), r in ratio.items() if of == n and (m * k >= LARGE) == large]
            mean, least = statistics.geometric_mean(found), min(found)
            print(f"{name:10} N={n:<3} {len(found):2} shapes: geometric mean {mean:.3f}, least {least:.3f}")
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    for m, k in sorted({key[:2] for key in best}, key=lambda shape: shape[0] * shape[1]):
        line = sorted((n, r) for (*shape, n), r in ratio.items() if shape == [m, k])
        panels[int(m * k >= LARGE)].plot(*zip(*line), marker=".", label=f"{m} x {k}")
    for panel, title in zip(panels, ("fewer than 50M weights", "50M weights or more")):
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", title=title, xlabel="N (rows of x)")
        panel.set_xscale("log", base=2)
        panel.legend(fontsize=7, ncols=2, title="M x K")
    panels[0].set_ylabel("time of cuBLAS (best) / time of jaxzip")
    figure.suptitle("lane-planar, H200, bare kernels in a CUDA graph, cold weights with real exponents")
    figure.tight_layout()
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
