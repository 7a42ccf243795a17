"""y[n, m] = x[n, k] W[m, k] + bias + residual on a Hopper GPU, W lane-planar: one Mosaic GPU kernel from x to y.

A CTA has a warp group that copies (TMA, into a ring of stages) and `row_groups * k_groups` that multiply. Each of those
decodes one 64x64 block at a time straight into the A operand of wgmma and multiplies it by the columns of x that lie
beside it in the stage. K may be split over the warp groups and over the CTAs of a cluster; then sums meet through
(distributed) shared memory, in rank order, so that results are the same from run to run.

    stage: x [N, 64 k_groups per_step] (128-byte swizzle) | blocks [row_groups][k_groups per_step]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxzip.pallas_kernels import lane_planar_block, mosaic_lanes, sums_epilogue

from jaxzip.formats import lane_planar as layout
from jaxzip.ops.manual_axes import varying, varying_alike, varying_over

SHARED_BYTES = 227 * 1024
_FIXED_BYTES = 2048  # barriers and what Mosaic keeps for itself
_REGISTER_FILE = 65536
_COPIER_REGISTERS = 24
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch splits its work.

    Attributes:
      row_groups: row blocks of 64 that a CTA works on at once.
      k_groups: warp groups that split K for each of them; a power of two.
      cluster: CTAs that split K, 1 to 8.
      stages: of the ring.
      per_step: blocks that a warp group takes from one stage. Stages of four blocks end on 128 bytes, as TMA wants.
    """

    row_groups: int
    k_groups: int = 1
    cluster: int = 1
    stages: int = 4
    per_step: int = 1

    @property
    def name(self) -> str:
        """How callers and tables of measurements name it; the stages are as many as there is room for."""
        return f"r{self.row_groups}k{self.k_groups} C{self.cluster}" + (
            f" p{self.per_step}" if self.per_step > 1 else ""
        )

    @property
    def groups(self) -> int:
        return self.row_groups * self.k_groups

    def stage_bytes(self, columns: int, width: int) -> int:
        blocks = self.groups * self.per_step * width * 4
        return blocks + columns * self.k_groups * self.per_step * layout.BLOCK * 2

    def output(self, n: int, m: int, dtype: jnp.dtype) -> sums_epilogue.Output:
        return sums_epilogue.Output(n, m, dtype, columns_of(n), self.cluster, self.row_groups, self.k_groups)

    def room_for_stages(self) -> int:
        """Bytes of shared memory beside patch planes and barriers."""
        return SHARED_BYTES - _FIXED_BYTES - self.groups * lane_planar_block.PLANE_SHAPE[0]

    def multiplier_registers(self) -> int:
        """A thread's registers where warp groups multiply; the copying one gives up what it does not need."""
        each = min(255, _REGISTER_FILE // ((self.groups + 1) * mosaic_lanes.WARP_GROUP)) // 8 * 8
        return min(240, (each * (self.groups + 1) - _COPIER_REGISTERS) // self.groups // 8 * 8)


def columns_of(n: int) -> int:
    """Columns of the wgmma instruction for ``n`` rows of x."""
    step = 8 if n <= 64 else 16 if n <= 128 else 32
    return -(-n // step) * step


def matmul(
    x: jax.Array,
    payload: Mapping[str, jax.Array],
    m: int,
    k: int,
    *,
    config: Config,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """``x @ W.T + bias + residual`` with fp32 sums and one rounding.

    Args:
      x: bf16 ``[N, K]``, N from 1 to 256.
      payload: `shift`, `blocks` and `overflow` of one weight.
      m: logical rows of the weight.
      k: logical columns of the weight.
      config: must fit the shared memory.
      bias: bf16 ``[M]``.
      residual: bf16 ``[N, M]``.
      out_dtype: bfloat16 or float32.

    Returns:
      ``[N, M]`` of ``out_dtype``.

    Raises:
      ValueError: the configuration does not fit.
    """
    n = x.shape[0]
    columns, width = columns_of(n), payload["blocks"].shape[2]
    row_blocks, k_blocks = layout.block_grid(m, k)
    # x is read in tiles of 8 x 64; TMA fills with zeros the tiles that lie past its end.
    pad_k = -k % layout.BLOCK
    if columns != n or pad_k:
        x = jnp.pad(x, ((0, columns - n), (0, pad_k)))
    addends = [a for a in (bias, residual) if a is not None]
    output = config.output(n, m, jnp.dtype(out_dtype))
    blocks, overflow = lane_planar_block.boxes(payload), lane_planar_block.overflow_list(payload)
    operands = varying_alike((x, blocks, overflow, payload["shift"], *addends))
    kernel = _kernel(config, output, row_blocks, k_blocks, width, bias is not None, residual is not None)
    return varying_over(varying(operands), kernel(*operands))


def _check(config: Config, output, k_steps: int, width: int) -> None:
    needed = max(config.stages * config.stage_bytes(output.columns, width), output.exchange_bytes)
    if needed > config.room_for_stages():
        raise ValueError(
            f"{config} needs {needed} bytes for its stages, there are {config.room_for_stages()}; N={output.n},"
            f" blocks of {width} words"
        )
    if config.groups * config.per_step * width % 32:
        raise ValueError(f"{config}: stages with blocks of {width} words do not end on 128 bytes")
    if (config.cluster - 1) * pl.cdiv(k_steps, config.cluster) >= k_steps:
        raise ValueError(f"{config} leaves a CTA without work: K has {k_steps} steps")


def _kernel(config: Config, output, row_blocks: int, k_blocks: int, width: int, has_bias: bool, has_residual: bool):
    k_step = config.k_groups * config.per_step
    steps = pl.cdiv(k_blocks, k_step)
    _check(config, output, steps, width)
    steps_of_rank = pl.cdiv(steps, config.cluster)
    tiles = pl.cdiv(row_blocks, config.row_groups)
    # CTAs take tiles one after another, unless partial sums go where the next operands would already be.
    launched = tiles if output.exchange_bytes else min(tiles, MULTIPROCESSORS)
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    ring = (
        plgpu.SMEM((config.stages, output.columns, layout.BLOCK * k_step), jnp.bfloat16, transforms=swizzled),
        plgpu.SMEM((config.stages, config.row_groups, k_step, *lane_planar_block.BOXES[width]), jnp.uint32),
    )
    exchange = plgpu.SMEM((output.exchange_bytes // 4,), jnp.float32)
    scratch = {
        "planes": plgpu.SMEM((config.groups, *lane_planar_block.PLANE_SHAPE), jnp.uint8),
        "memory": plgpu.RefUnion(ring, exchange) if output.exchange_bytes else ring,
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        "empty": plgpu.Barrier(num_arrivals=config.groups, num_barriers=config.stages),
    }
    if config.cluster > 1:
        scratch["received"] = plgpu.SMEM((config.groups * sums_epilogue.BARRIER_WORDS,), jnp.uint32)

    def kernel(x_ref, blocks_ref, overflow_ref, shift_ref, *rest, planes, memory, full, empty, received=None):
        rest = list(rest)
        bias_ref = rest.pop(0) if has_bias else None
        residual_ref = rest.pop(0) if has_residual else None
        (y_ref,) = rest
        (x_ring, block_ring), exchange_ref = memory if output.exchange_bytes else (memory, None)
        cta, group = lax.axis_index("tile"), lax.axis_index("group")
        rank = lax.axis_index("rank") if config.cluster > 1 else jnp.int32(0)
        first_step = rank * steps_of_rank
        own_steps = jnp.minimum(steps - first_step, steps_of_rank)
        own_tiles = (tiles - cta + launched - 1) // launched

        def copy():
            plgpu.set_max_registers(_COPIER_REGISTERS, action="decrease")

            def step(i, _):
                tile, at = cta + i // own_steps * launched, first_step + lax.rem(i, own_steps)
                slot = lax.rem(i, config.stages)
                pl.when(i >= config.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                rows = pl.ds(tile * config.row_groups, config.row_groups)
                part = blocks_ref.at[rows, pl.ds(at * k_step, k_step)]
                plgpu.copy_gmem_to_smem(part, block_ring.at[slot], full.at[slot])
                x_part = x_ref.at[:, pl.ds(at * (layout.BLOCK * k_step), layout.BLOCK * k_step)]
                plgpu.copy_gmem_to_smem(x_part, x_ring.at[slot], full.at[slot])

            lax.fori_loop(0, own_tiles * own_steps, step, None)
            sums_epilogue.meet(output)

        def multiply():
            plgpu.set_max_registers(config.multiplier_registers(), action="increase")
            sums_epilogue.prepare(output, group, rank, received)
            row_group, k_group = group // config.k_groups, lax.rem(group, config.k_groups)
            plane = planes.at[group]

            def tile(i, _):
                row_block = (cta + i * launched) * config.row_groups + row_group
                lane_planar_block.fill_plane(plane)

                def sum_up(sums_ref):
                    def step(j, _):
                        slot = lax.rem(i * own_steps + j, config.stages)
                        plgpu.barrier_wait(full.at[slot])
                        for b in range(config.per_step):
                            part = k_group * config.per_step + b
                            number = 1 + row_block * k_blocks + (first_step + j) * k_step + part
                            block = block_ring.at[slot, row_group, part]
                            a = lane_planar_block.decode(block, plane, overflow_ref, number)
                            x_part = x_ring.at[slot, :, pl.ds(layout.BLOCK * part, layout.BLOCK)]
                            plgpu.wgmma(sums_ref, a, x_part.T)
                            plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])

                    lax.fori_loop(0, own_steps, step, None)
                    memories = (plane, exchange_ref, received, shift_ref, bias_ref, residual_ref, y_ref)
                    sums_epilogue.finish(output, sums_ref[...], row_block, group, rank, *memories)

                pl.run_scoped(sum_up, plgpu.ACC((layout.BLOCK, output.columns), jnp.float32))

            lax.fori_loop(0, own_tiles, tile, None)

        pl.when(group == config.groups)(copy)
        pl.when(group < config.groups)(multiply)

    clusters = {"cluster": (config.cluster,), "cluster_names": ("rank",)} if config.cluster > 1 else {}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((output.n, output.m), output.dtype),
        grid=(launched,),
        grid_names=("tile",),
        **clusters,
        num_threads=config.groups + 1,
        thread_name="group",
        kernel_name="jaxzip_lane_planar_matmul",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
