"""The end of a matmul: sums of 64 rows through shared memory, scaled, plus bias and residual, rounded once, to y."""

from __future__ import annotations

import jax.numpy as jnp
from jaxzip.pallas_kernels import mosaic_lanes as lanes

GROUP = 8  # columns that are written together
ITEM_BYTES = 64 * GROUP * 4
STAGED = 2  # groups that the staging takes at a time: the 4 KB of a warp group's patch planes


class Writer:
    """Writes groups of 8 columns of a warp group's 64 rows; a thread has four neighbouring rows m of one column."""

    def __init__(self, n: int, m: int, dtype, row_block, stage, shift, bias, residual, y):
        add, both, multiply, shift_left = lanes.add, lanes.both, lanes.multiply, lanes.shift_left
        self.n, self.m, self.dtype, self.residual, self.y = n, m, dtype, residual, y
        self.vectors = m % 4 == 0  # or loads and stores of single elements
        thread = lanes.thread()
        warp, lane = shift_left(thread, -5), both(thread, 31)
        g, t = shift_left(lane, -2), both(lane, 3)
        # Rows m ^ 8 (n / 2 % 4) of column n: 4-byte stores by (g, t) and 16-byte loads hit every bank once.
        row = add(multiply(warp, 16), g)
        swizzle = shift_left(t, 3)
        self.store_at = [
            add(stage, multiply(t, 2 * 256), shift_left(lanes.arith.xori(add(row, 8 * half), swizzle), 2))
            for half in range(2)
        ]
        column, four = shift_left(thread, -4), shift_left(both(thread, 15), 2)
        self.column = column
        swizzled = lanes.arith.xori(four, shift_left(both(shift_left(column, -1), 3), 3))
        self.load_at = add(stage, multiply(column, 256), shift_left(swizzled, 2))
        self.row = add(multiply(row_block, 64), four)
        self.scale = self._scales(shift)
        self.bias = None if bias is None else self._load_bf16(lanes.global_address(bias), self.row, self._inside(None))

    def write(self, groups: list[tuple]) -> None:
        """Each group: its first column (int32), the lane's four sums as in `sums_by_column_group`."""
        lanes.warp_group_barrier()  # what was staged before is read
        for i, (_, values) in enumerate(groups):
            for half in range(2):
                for column in range(2):
                    offset = i * ITEM_BYTES + 256 * column
                    value = values[2 * half + column]
                    lanes.asm(f"st.shared.f32 [$0+{offset}], $1;", "r,f", self.store_at[half], value)
        lanes.warp_group_barrier()
        for i, (first_column, _) in enumerate(groups):
            text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{i * ITEM_BYTES}];"
            values = lanes.asm(text, "=f,=f,=f,=f,r", self.load_at, results=[lanes.f32()] * 4)
            n = lanes.add(first_column, self.column)
            values = [lanes.float_operation("mul.rn.f32 $0, $1, $2;", v, s) for v, s in zip(values, self.scale)]
            if self.bias is not None:
                values = [lanes.float_operation("add.rn.f32 $0, $1, $2;", v, b) for v, b in zip(values, self.bias)]
            inside, index = self._inside(n), lanes.add(lanes.multiply(n, self.m), self.row)
            if self.residual is not None:
                addend = self._load_bf16(lanes.global_address(self.residual), index, inside)
                values = [lanes.float_operation("add.rn.f32 $0, $1, $2;", v, r) for v, r in zip(values, addend)]
            self._store(index, values, inside)

    def _scales(self, shift) -> list:
        """2^-shift of the four rows."""
        (packed,) = lanes.asm(
            "{ .reg .b64 a; cvt.u64.u32 a, $2; add.u64 a, a, $1; ld.global.nc.b32 $0, [a]; }", "=r,l,r",
            lanes.global_address(shift), self.row, results=[lanes.i32()],
        )  # fmt: skip
        scales = []
        for i in range(4):
            (value,) = lanes.asm(
                f"{{ .reg .b32 s; bfe.s32 s, $1, {8 * i}, 8; sub.s32 s, 127, s; shl.b32 s, s, 23; mov.b32 $0, s; }}",
                "=f,r", packed, results=[lanes.f32()], pure=True,
            )  # fmt: skip
            scales.append(value)
        return scales

    def _inside(self, n) -> list:
        """For each of the four rows (for all at once where they are loaded so): 1 where it and column n exist."""
        flags = []
        for i in range(1 if self.vectors else 4):
            text = "{{ .reg .pred p, q; setp.lt.u32 p, $1, {}; {} selp.b32 $0, 1, 0, p; }}"
            of_n = "" if n is None else f"setp.lt.and.u32 p, $2, {self.n}, p;"
            operands = [lanes.add(self.row, i)] + ([] if n is None else [n])
            constraints = ",".join(["=r"] + ["r"] * len(operands))
            flags += lanes.asm(text.format(self.m, of_n), constraints, *operands, results=[lanes.i32()], pure=True)
        return flags

    def _load_bf16(self, base, index, inside: list) -> list:
        """Four neighbouring bf16 as fp32, 0 where they are not inside."""
        address = "{ .reg .pred p; .reg .b64 a; setp.ne.u32 p, $IN, 0; mad.wide.u32 a, $INDEX, 2, $BASE;"
        if self.vectors:
            text = address + " mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.nc.v2.b32 {$0, $1}, [a]; }"
            text = text.replace("$INDEX", "$3").replace("$IN", "$2").replace("$BASE", "$4")
            words = lanes.asm(text, "=&r,=&r,r,r,l", inside[0], index, base, results=[lanes.i32()] * 2)
            high = 0xFFFF0000
            bits = [b for word in words for b in (lanes.shift_left(word, 16), lanes.both(word, high))]
        else:
            text = (
                address + " .reg .b16 h; mov.b16 h, 0; @p ld.global.nc.b16 h, [a]; cvt.u32.u16 $0, h;"
                " shl.b32 $0, $0, 16; }"
            )
            text = text.replace("$INDEX", "$2").replace("$IN", "$1").replace("$BASE", "$3")
            bits = [
                lanes.asm(text, "=&r,r,r,l", inside[i], lanes.add(index, i), base, results=[lanes.i32()])[0]
                for i in range(4)
            ]
        return [lanes.llvm.bitcast(lanes.f32(), b) for b in bits]

    def _store(self, index, values: list, inside: list) -> None:
        base = lanes.global_address(self.y)
        wide = self.dtype == jnp.float32
        address = f"{{ .reg .pred p; .reg .b64 a; setp.ne.u32 p, $0, 0; mad.wide.u32 a, $1, {4 if wide else 2}, $2;"
        if self.vectors and wide:
            text = address + " @p st.global.v4.f32 [a], {$3, $4, $5, $6}; }"
        elif self.vectors:
            text = address + (
                " .reg .b32 x, y; cvt.rn.bf16x2.f32 x, $4, $3; cvt.rn.bf16x2.f32 y, $6, $5;"
                " @p st.global.v2.b32 [a], {x, y}; }"
            )
        elif wide:
            text = address + " @p st.global.f32 [a], $3; }"
        else:
            text = address + " .reg .b16 h; cvt.rn.bf16.f32 h, $3; @p st.global.b16 [a], h; }"
        if self.vectors:
            lanes.asm(text, "r,r,l,f,f,f,f", inside[0], index, base, *values)
            return
        for i in range(4):
            lanes.asm(text, "r,r,l,f", inside[i], lanes.add(index, i), base, values[i])
