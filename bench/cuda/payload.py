"""Writes matrices encoded by jaxzip for ``lane_planar_bench check``: payload.py FOLDER."""

import pathlib
import sys

import numpy as np

from jaxzip.formats.lane_planar import LanePlanar
from jaxzip.testing import all_bit_patterns, bimodal_weights, bits, gaussian_weights

MATRICES = {
    "patterns": all_bit_patterns(),
    "bimodal": bimodal_weights((500, 300)),
    "gaussian": gaussian_weights((1024, 640)),
    "spread": gaussian_weights((700, 450), sigma=3e-4),
    "cells": np.repeat(gaussian_weights((64, 64)), 3, 0) * gaussian_weights((192, 64), sigma=1),
}


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, w in MATRICES.items():
        matrix = np.ascontiguousarray(bits(w).T)
        payload = LanePlanar().encode(matrix)
        sizes = np.array([*matrix.shape, payload["blocks"].shape[-1], payload["overflow"].size // 2], np.int32)
        arrays = (sizes, matrix, payload["shift"], payload["blocks"], payload["overflow"])
        (folder / name).write_bytes(b"".join(a.tobytes() for a in arrays))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
