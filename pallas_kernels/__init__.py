"""Pallas kernels of jaxzip's operations, implementation ``"pallas"``.

backend ──► lane_planar_portable ─────┬──► portable_matmul    public Pallas: interpreted on the CPU, Triton on a GPU
        └─► tca_tbe_portable, _matmul ┘
        └─► matmul_configs ──► lane_planar_matmul ──► sums_epilogue ─┐   Mosaic, on a Hopper GPU
        └─► lane_planar_decompress ──► lane_planar_block ────────────┴─► mosaic_lanes (all of private jax)
"""
