"""Pallas kernels of jaxzip's operations, implementation ``"pallas"``.

`backend` registers them; `lane_planar_portable` uses public Pallas only (interpreted on the CPU, Triton on a GPU).
"""
