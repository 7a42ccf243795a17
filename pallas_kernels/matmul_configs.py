"""Which configuration of the lane-planar matmul a shape gets, unless another is named: the least modelled time."""

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
#: Most of them that are worth timing for one product.
MOST = 4


def choose(n: int, m: int, k: int, width: int) -> Config:
    """The configuration for ``x[N, K]`` and a weight ``[M, K]`` in blocks of ``width`` words.

    Raises:
      NotImplementedError: no configuration takes so many rows of x.
    """
    by_time = _by_time(n, m, k, width)
    if not by_time:
        raise NotImplementedError(f"no configuration of the Pallas kernel for {n} rows of x")
    return by_time[0]


def best(n: int, m: int, k: int, width: int) -> list[Config]:
    """The few that are worth timing: what ``choose`` gives, then the next."""
    return _by_time(n, m, k, width)[:MOST]


def find(name: str, n: int, m: int, k: int, width: int) -> Config | None:
    """The configuration of this name, as ``Config.name`` spells it; ``None`` if this product has none such."""
    return next((config for config in _by_time(n, m, k, width) if config.name == name), None)


def _by_time(n: int, m: int, k: int, width: int) -> list[Config]:
    """All that fit, by the time that the model gives them."""
    columns = columns_of(n)
    row_blocks, k_blocks = layout.block_grid(m, k)
    modelled = []
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
            modelled.append((waves * (steps * us + _WAVE_US + _SOURCE_US * k_groups * cluster), config))
    modelled.sort(key=lambda pair: pair[0])
    if modelled:
        return [config for _, config in modelled]
    # Sums of many columns fill the registers: two warp groups, and as many CTAs as there is room for at once.
    tiles = -(-row_blocks // 2)
    clusters = range(min(8, max(1, MULTIPROCESSORS // tiles)), 0, -1)
    fitted = (_fitted(Config(2, 1, cluster, per_step=2), columns, k_blocks, width) for cluster in clusters)
    return [config for config in fitted if config is not None]


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
