"""What ``bench/generate.py`` says of its rows: compressed weights against dense ones, and a plot."""

from __future__ import annotations

import pathlib

#: What rows of dense weights have in place of a format.
DENSE = "dense"


def compare(rows: list[dict]) -> list[dict]:
    """Steps of compressed weights against dense ones, batch by batch."""
    dense = {(r["model"], r["batch"]): r for r in rows if r["weights"] == DENSE}
    found = []
    for row in rows:
        other = dense.get((row["model"], row["batch"]))
        if row["weights"] != DENSE and other:
            found.append(
                {
                    "model": row["model"], "weights": row["weights"], "variant": row["variant"], "batch": row["batch"],
                    "ms": row["ms per step"], "dense ms": other["ms per step"],
                    "speedup": other["ms per step"] / row["ms per step"],
                    "tokens/s": row["tokens/s"],
                    "memory": row["weight bytes"] / other["weight bytes"], "of floor": row["share of floor"],
                    "dense of floor": other["share of floor"],
                }
            )  # fmt: skip
    return found


def compare_prefill(rows: list[dict]) -> list[dict]:
    """Times to the first token of compressed weights against dense ones."""
    dense = {(r["model"], r["batch"], r["prompt"]): r["ms to first token"] for r in rows if r["weights"] == DENSE}
    found = []
    for row in rows:
        other = dense.get((row["model"], row["batch"], row["prompt"]))
        if row["weights"] != DENSE and other:
            kept = {key: row[key] for key in ("model", "weights", "variant", "batch", "prompt")}
            ms = row["ms to first token"]
            found.append({**kept, "ms": ms, "dense ms": other, "overhead %": 100 * (ms / other - 1)})
    return found


def plot(about: dict[str, dict], path: pathlib.Path) -> None:
    """Milliseconds a step against the batch, a panel a model, with the floor that the bytes set."""
    import matplotlib.pyplot as plt

    rows = [row for row in all_rows(about) if not row.get("variant")]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for panel, model in zip(panels[0], models):
        for weights in dict.fromkeys(row["weights"] for row in rows):
            found = sorted(
                (r for r in rows if (r["model"], r["weights"]) == (model, weights)), key=lambda r: r["batch"]
            )
            batches = [r["batch"] for r in found]
            (line,) = panel.plot(batches, [r["ms per step"] for r in found], marker="o", label=weights)
            floors = [r["floor ms"] for r in found]
            panel.plot(
                batches, floors, ":", color=line.get_color(), label=f"{weights}: its bytes at the speed of a copy"
            )
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        layers, of = about[model]["layers"], about[model]["of"]
        panel.set_title(model if layers == of else f"{model}, {layers} of {of} layers")
        panel.set_xlabel("batch")
        panel.set_xticks(batches, batches)
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("ms per decode step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def all_rows(models: dict[str, dict], kind: str = "rows") -> list[dict]:
    return [row for model in models.values() for row in model.get(kind, [])]
