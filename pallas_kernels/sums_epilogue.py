"""From a warp group's fp32 sums to y: partial sums met in fixed order, rows scaled, addends, one rounding, y[n, m].

wgmma leaves a lane with two rows (m) of two neighbouring columns (n) of every 8. y wants whole rows of m, so groups of
8 columns go through shared memory, [n][64 m] with m permuted by n so that neither side has bank conflicts:

    sums in registers ──(K is split)──► exchange: each item (row group, 8 columns) with its owner, from every source
          └──────────────────────────────────┴──► staging [16 n][64 m] ──► scale, bias, residual ──► y

Sums cross CTAs by `st.async`, which counts bytes on a barrier of the owner: a fence of the whole cluster costs more.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxzip.pallas_kernels import mosaic_lanes as lanes
from jaxzip.pallas_kernels import y_writer

_EXCHANGE_BARRIER = 15  # of the CTA's sixteen; Mosaic GPU uses the first ones
#: u32 words of a warp group's barrier.
BARRIER_WORDS = 2


@dataclasses.dataclass(frozen=True)
class Output:
    """What y is and who has which sums: static facts of one matmul.

    Attributes:
      n: rows of y, at most `columns`.
      m: columns of y.
      dtype: bfloat16 or float32.
      columns: of the sums, a multiple of 8.
      cluster: CTAs that split K.
      row_groups: of 64 rows, in a CTA.
      k_groups: warp groups of a CTA that split K for each row group; a power of two.
    """

    n: int
    m: int
    dtype: jnp.dtype
    columns: int
    cluster: int
    row_groups: int
    k_groups: int

    @property
    def sources(self) -> int:
        """Warp groups that have sums of the same rows."""
        return self.cluster * self.k_groups

    @property
    def column_groups(self) -> int:
        return self.columns // y_writer.GROUP

    @property
    def owned(self) -> int:
        """Items of a row group that a CTA owns, at most: column group c belongs to rank c % cluster."""
        return -(-self.column_groups // self.cluster)

    @property
    def exchange_bytes(self) -> int:
        """Shared memory for the partial sums that a CTA receives; 0 where K is not split."""
        return self.row_groups * self.owned * self.sources * y_writer.ITEM_BYTES if self.sources > 1 else 0


def prepare(output: Output, group, rank, barrier_ref) -> None:
    """Called first by every consumer warp group of a CTA.

    Args:
      output: see there.
      group: int32, the warp group's number: row group * k_groups + k group.
      rank: int32, the CTA's in its cluster.
      barrier_ref: u32 ``[BARRIER_WORDS * groups]`` in shared memory.
    """
    if output.cluster == 1:
        return

    @lanes.inline([plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT, plgpu.RefType()])
    def emit(group, rank, barrier):
        group, rank = lanes.scalar(group), lanes.scalar(rank)
        _, k_group = _divide(group, output.k_groups)
        items = lanes.constant(0)
        for i in range(_rounds(output)):
            first = lanes.add(lanes.multiply(k_group, output.cluster), i * output.k_groups * output.cluster)
            text = f"{{ .reg .pred p; setp.lt.u32 p, $1, {output.column_groups}; selp.b32 $0, 1, 0, p; }}"
            items = lanes.add(items, *lanes.asm(text, "=r,r", lanes.add(first, rank), results=[lanes.i32()], pure=True))
        at = lanes.add(lanes.shared_address(barrier), lanes.multiply(group, 4 * BARRIER_WORDS))
        lanes.asm(
            "{ .reg .pred p; setp.eq.u32 p, $0, 0; @p mbarrier.init.shared.b64 [$1], 1;"
            " @p fence.mbarrier_init.release.cluster;"
            " @p mbarrier.arrive.expect_tx.shared.b64 _, [$1], $2; }",
            "r,r,r", lanes.thread(), at, lanes.multiply(items, output.sources * y_writer.ITEM_BYTES),
        )  # fmt: skip

    emit(jnp.int32(group), jnp.int32(rank), barrier_ref)


def finish(output: Output, sums, row_block, group, rank, stage, exchange, barriers, shift, bias, residual, y) -> None:
    """Called by every consumer warp group of a CTA.

    Args:
      output: see there.
      sums: fp32 ``[64, columns]`` of this warp group.
      row_block: int32, number of its 64 rows.
      group: as in `prepare`.
      rank: as in `prepare`.
      stage: 4 KB of shared memory of the warp group's own.
      exchange: exchange_bytes of shared memory of the CTA, where operands may have been; None where K is not split.
      barriers: what `prepare` got; None where no cluster splits K.
      shift: int8 ``[64 R]`` in global memory; so are the following.
      bias: bf16 ``[M]`` or None.
      residual: bf16 ``[N, M]`` or None.
      y: ``[N, M]``.
    """
    given = [stage, exchange, barriers, shift, bias, residual, y]
    refs = [ref for ref in given if ref is not None]
    types = [plgpu.Layout.WGMMA, *[plgpu.Layout.WG_SPLAT] * 3, *[plgpu.RefType()] * len(refs)]

    @lanes.inline(types)
    def emit(sums, row_block, group, rank, *some):
        some = iter(some)
        every = [None if ref is None else next(some) for ref in given]
        _emit(output, sums, *(lanes.scalar(value) for value in (row_block, group, rank)), *every)

    emit(sums, *[jnp.int32(value) for value in (row_block, group, rank)], *refs)


def meet(output: Output) -> None:
    """What warp groups without sums call where the others call `finish`."""
    if output.cluster > 1:
        lanes.inline([])(_operands_are_used)()


def _operands_are_used() -> None:
    # No data goes with it: it says that nobody reads the operands any more.
    lanes.asm("barrier.cluster.arrive.relaxed; barrier.cluster.wait;", "")


def _emit(output, sums, row_block, group, rank, stage, exchange, barriers, shift, bias, residual, y) -> None:
    groups = lanes.sums_by_column_group(sums)
    writer = y_writer.Writer(
        output.n, output.m, output.dtype, row_block, lanes.shared_address(stage), shift, bias, residual, y
    )
    if output.sources == 1:
        for at in range(0, len(groups), y_writer.STAGED):
            part = groups[at : at + y_writer.STAGED]
            writer.write([(lanes.constant(y_writer.GROUP * (at + i)), values) for i, values in enumerate(part)])
        return

    row_group, k_group = _divide(group, output.k_groups)
    source = lanes.add(lanes.multiply(rank, output.k_groups), k_group)
    base = lanes.add(
        lanes.shared_address(exchange),
        lanes.multiply(row_group, output.owned * output.sources * y_writer.ITEM_BYTES),
        lanes.multiply(lanes.thread(), 16),
    )
    if output.cluster > 1:
        first_barrier = lanes.shared_address(barriers)
        _operands_are_used()
        _send(output, groups, base, source, row_group, first_barrier)
        own = lanes.add(first_barrier, lanes.multiply(group, 4 * BARRIER_WORDS))
        lanes.asm(
            "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], 0;"
            " @!p bra WAIT; }",
            "r", own,
        )  # fmt: skip
    else:
        _consumer_barrier(output)
        at = lanes.add(base, lanes.multiply(source, y_writer.ITEM_BYTES))
        for i, values in enumerate(groups):
            offset = i * output.sources * y_writer.ITEM_BYTES
            lanes.asm(f"st.shared.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};", "r,f,f,f,f", at, *values)
        _consumer_barrier(output)

    # A CTA's items of a row group go round its warp groups.
    for at in range(0, _rounds(output), y_writer.STAGED):
        part = []
        for j in range(at, min(_rounds(output), at + y_writer.STAGED)):
            item = lanes.add(k_group, j * output.k_groups)
            (there,) = lanes.asm(f"min.u32 $0, $1, {output.owned - 1};", "=r,r", item, results=[lanes.i32()], pure=True)
            address = lanes.add(base, lanes.multiply(there, output.sources * y_writer.ITEM_BYTES))
            column = lanes.multiply(lanes.add(lanes.multiply(item, output.cluster), rank), y_writer.GROUP)
            part.append((column, _sum_of_sources(output, address)))
        writer.write(part)


def _rounds(output: Output) -> int:
    return -(-output.owned // output.k_groups)


def _send(output: Output, groups: list, base, source, row_group, first_barrier) -> None:
    at = lanes.add(base, lanes.multiply(source, y_writer.ITEM_BYTES))
    barrier = lanes.add(first_barrier, lanes.multiply(row_group, 4 * BARRIER_WORDS * output.k_groups))
    for c, values in enumerate(groups):
        owner, item = c % output.cluster, c // output.cluster
        lanes.asm(
            f"{{ .reg .b32 a, b; add.u32 a, $0, {item * output.sources * y_writer.ITEM_BYTES};"
            f" add.u32 b, $1, {item % output.k_groups * 4 * BARRIER_WORDS};"
            f" mapa.shared::cluster.u32 a, a, {owner}; mapa.shared::cluster.u32 b, b, {owner};"
            " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {$2, $3, $4, $5}, [b]; }",
            "r,r,f,f,f,f", at, barrier, *values,
        )  # fmt: skip


def _consumer_barrier(output: Output) -> None:
    threads = output.row_groups * output.k_groups * lanes.WARP_GROUP
    lanes.asm(f"bar.sync {_EXCHANGE_BARRIER}, {threads};", "")


def _divide(value, by: int):
    """Quotient and remainder by a small power of two."""
    return lanes.shift_left(value, 1 - by.bit_length()) if by > 1 else value, lanes.both(value, by - 1)


def _sum_of_sources(output: Output, address) -> list:
    parts = []
    for source in range(output.sources):
        text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{source * y_writer.ITEM_BYTES}];"
        parts.append(lanes.asm(text, "=f,=f,=f,=f,r", address, results=[lanes.f32()] * 4))
    total = parts[0]
    for part in parts[1:]:
        total = [lanes.float_operation("add.rn.f32 $0, $1, $2;", a, b) for a, b in zip(total, part)]
    return total
