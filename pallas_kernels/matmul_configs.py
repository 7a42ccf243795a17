"""Which configuration of the lane-planar matmul a shape gets: the least modelled time."""

from __future__ import annotations

import dataclasses

from jaxzip.pallas_kernels.lane_planar_matmul import MULTIPROCESSORS, Config, columns_of

from jaxzip.formats import lane_planar as layout

#: Clusters of 1..8 CTAs, one CTA a multiprocessor, that an H200 runs at once.
_RESIDENT = (132, 66, 39, 30, 22, 17, 15, 15)
#: Microseconds of a step of four warp groups, by (row groups, k groups) and by the columns of x at most; fitted to six
#: shapes from 1024x4096 to 34816x5120. Row groups share what they read of x, k groups have fewer steps.
_STEP_US = {
    (1, 4): {32: 0.85, 64: 1.00, 128: 1.65},
    (2, 2): {32: 0.85, 64: 0.93, 128: 1.30},
    (4, 1): {32: 0.85, 64: 0.93, 128: 1.25},
}
#: Of a wave of CTAs, and for each warp group whose partial sums are added.
_WAVE_US, _SOURCE_US = 1.2, 0.2
_MOST_STAGES = 6


def choose(n: int, m: int, k: int, width: int) -> Config:
    """The configuration for ``x[N, K]`` and a weight ``[M, K]`` in blocks of ``width`` words.

    Raises:
      NotImplementedError: no configuration takes so many rows of x.
    """
    columns = columns_of(n)
    row_blocks, k_blocks = layout.block_grid(m, k)
    best, least = None, float("inf")
    for (row_groups, k_groups), step_us in _STEP_US.items():
        us = next((us for most, us in step_us.items() if columns <= most), None)
        if us is None:
            continue
        for cluster, resident in enumerate(_RESIDENT, 1):
            config = _fitted(Config(row_groups, k_groups, cluster), columns, k_blocks, width)
            if config is None:
                continue
            waves = -(-row_blocks // (row_groups * resident))
            steps = -(-k_blocks // (k_groups * cluster))
            modelled = waves * (steps * us + _WAVE_US + _SOURCE_US * k_groups * cluster)
            if modelled < least:
                best, least = config, modelled
    if best is None:  # sums of many columns fill the registers: two warp groups
        tiles = -(-row_blocks // 2)
        for cluster in range(min(8, max(1, MULTIPROCESSORS // tiles)), 0, -1):
            best = best or _fitted(Config(2, 1, cluster, per_step=2), columns, k_blocks, width)
    if best is None:
        raise NotImplementedError(f"no configuration of the Pallas kernel for {n} rows of x")
    return best


def _fitted(config: Config, columns: int, k_blocks: int, width: int) -> Config | None:
    """With as many stages as there is room for; None if there is none, or the split leaves a CTA without work."""
    steps = -(-k_blocks // (config.k_groups * config.per_step))
    if (config.cluster - 1) * -(-steps // config.cluster) >= steps:
        return None
    stage = config.stage_bytes(columns, width)
    stages = min(_MOST_STAGES, config.room_for_stages() // stage)
    exchange = config.output(columns, layout.BLOCK, None).exchange_bytes
    if stages < 2 or exchange > config.room_for_stages():
        return None
    return dataclasses.replace(config, stages=stages)
