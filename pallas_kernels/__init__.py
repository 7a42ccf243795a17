"""Pallas kernels, one a file; each registers itself as implementation `"pallas"`."""
