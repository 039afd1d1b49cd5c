"""Pallas kernels for TPUs: reading maps at points, and choosing the most uncertain points.

A TPU reads scalars of an array one by one, about 14 cycles each. But inside one of its registers, 8 x 128 values, every value
of a row may come from any place of another register's row. So a map is a table of such rows in vector memory. Each is looked up
for all points of a step, and a point keeps what it finds in the row that it is about. Eight maps lie in the eight rows of a
register.

Of the most uncertain points, a search over the bits of a magnitude finds the largest that stays. Those that stay then move
together: by 1, 2, 4, ... places, each by as many as have gone before it. Nothing is gathered, scattered or sorted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

from flowseg_jax.ops.collectives import on_each_device
from flowseg_jax.ops.dot import einsum
from flowseg_jax.ops.points.corners import pixel_corners

LANES = 128
_LANE_BITS = 7
MAPS = 8  # maps a step, the rows of a register
POINTS = 512  # points of each map a step
LOOKED_UP = 8  # rows of the table that are looked up before a loop begins anew
WORD = 31  # pixels of a mask by which the words of its table are apart: each holds 32, so a pixel's right neighbour too
MOVED = 42  # registers that are worked on before a loop begins anew
TABLE_BYTES = 16 * 2**20
VMEM_BYTES = 48 * 2**20  # of the 64 MiB and more that TPUs from v5e on have


def reads(h: int, w: int) -> bool:
    """Whether a map's table fits into vector memory."""
    return 4 * MAPS * h * -(-w // LANES) * LANES <= TABLE_BYTES


def chooses(count: int) -> bool:
    """Whether so many candidates can be counted: two counts share an integer."""
    return -(-count // (MOVED * LANES)) * MOVED * LANES < 2**16


def read(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"], interpret: Any = False) -> Float[Array, "n p"]:
    """Bilinear samples of each map at its own points, in float32; `interpret` runs on any platform, to be tested."""
    _, h, w = maps.shape
    table = _pad(_pad(jnp.moveaxis(maps.astype(jnp.float32), 1, 0), 1, MAPS), 2, LANES)
    return _look_up(functools.partial(_read_kernel, h, w), "read maps", table, points, interpret)


def read_packed(
    masks: UInt8[Array, "n s bytes"], points: Float[Array, "n p 2"], width: int, interpret: Any = False
) -> Float[Array, "n p"]:
    """As `read`, of binary masks packed along the width, which is `width` pixels."""
    table = _pad(_pad(_words(masks, width), 1, MAPS), 2, LANES)
    return _look_up(functools.partial(_packed_kernel, masks.shape[1], width), "read packed masks", table, points, interpret)


def of_smallest(
    magnitude: Float[Array, "n c"], candidates: Float[Array, "n c 2"], keep: int, interpret: Any = False
) -> Float[Array, "n {keep} 2"]:
    """The candidates of the `keep` smallest magnitudes, in the order in which they come; of equal ones the first."""
    n, count = magnitude.shape
    bits = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)
    largest = jnp.iinfo(jnp.int32).max
    bits = _pad(_pad(bits, 1, MOVED * LANES, largest), 0, MAPS)
    x, y = (_pad(_pad(candidates[..., axis].astype(jnp.float32), 1, MOVED * LANES), 0, MAPS) for axis in range(2))
    lanes, kept, loops = bits.shape[1], -(-keep // LANES) * LANES, bits.shape[1] // (MOVED * LANES)
    distances, steps = (count - keep).bit_length(), len(bits) // MAPS
    stages = min(distances, _LANE_BITS), max(0, distances - _LANE_BITS)
    block = lambda width: pl.BlockSpec((MAPS, width), lambda i: (i, 0))  # noqa: E731
    bodies = [31 * loops, loops, *(loops * stage for stage in stages if stage)]
    run = pl.pallas_call(
        functools.partial(_choose_kernel, keep, stages),
        grid=(steps,),
        in_specs=[block(lanes)] * 3,
        out_specs=[block(kept)] * 2,
        out_shape=[jax.ShapeDtypeStruct((len(bits), kept), jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((MAPS, lanes), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        metadata=_metadata(f"choose {keep} of {count} points", steps, [steps * body for body in bodies]),
    )
    return jnp.stack([axis[:n, :keep] for axis in on_each_device(run, bits, x, y)], -1)


def _words(masks: UInt8[Array, "n s bytes"], width: int) -> Int[Array, "j n s"]:
    """A table whose word j of a row holds the 32 pixels from `WORD` * j on, the first in the highest bit."""
    nbytes = masks.shape[2]
    # A product joins two bytes: sums of two terms below 2 ** 16, which float32 holds.
    joined, byte = np.zeros((nbytes, -(-nbytes // 4), 2)), np.arange(nbytes)
    joined[byte, byte // 4, byte % 4 // 2] = np.where(byte % 2 == 0, 256, 1)
    halves = einsum("nsb,bkf->fkns", masks.astype(jnp.bfloat16), jnp.asarray(joined, jnp.bfloat16))
    halves = halves.astype(jnp.int32).astype(jnp.uint32)
    words = halves[0] << 16 | halves[1]
    nothing = jnp.zeros_like(words[:1])
    found = []
    for j in range(_word_count(width)):
        first, shift = divmod(WORD * j, 32)
        after = words[first + 1] if first + 1 < len(words) else nothing[0]
        found.append(words[first] << shift | (after >> 32 - shift if shift else nothing[0]))
    return jax.lax.bitcast_convert_type(jnp.stack(found), jnp.int32)


def _word_count(width: int) -> int:
    """The last pixel of a row has no right neighbour: it may be the last of a word."""
    return max(1, -(-(width - 1) // WORD))


def _look_up(kernel: Callable, name: str, table: Array, points: Float[Array, "n p 2"], interpret: Any) -> Float[Array, "n p"]:
    """Runs a kernel over all maps and points. The table is [rows, maps, lanes]; rows are added to whole loops."""
    n, count = points.shape[:2]
    table = _pad(table, 0, _unrolled(table.shape[2]))
    x, y = (_pad(_pad(points[..., axis].astype(jnp.float32), 0, MAPS), 1, POINTS) for axis in range(2))
    grid = len(x) // MAPS, x.shape[1] // POINTS
    block = pl.BlockSpec((MAPS, POINTS), lambda i, j: (i, j))
    loops = math.prod(grid) * (len(table) // _unrolled(table.shape[2]))
    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec((len(table), MAPS, table.shape[2]), lambda i, j: (0, i, 0)), block, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        metadata=_metadata(f"{name} {len(table)} x {table.shape[2]}", math.prod(grid), [loops]),
    )
    return on_each_device(run, table, x, y)[:n, :count]


def _unrolled(lanes: int) -> int:
    """Rows of the table, each of several registers, that one round of the loop looks up."""
    return max(1, LOOKED_UP * LANES // lanes)


def _read_kernel(h: int, w: int, table_ref, x_ref, y_ref, out_ref) -> None:
    pixels = pixel_corners(x_ref[...] * w - 0.5, y_ref[...] * h - 0.5, h, w)
    rows, columns = (pixels[0][0], pixels[2][0]), (pixels[0][1], pixels[1][1])
    found = _find(table_ref, columns, [(row, side) for row in rows for side in range(2)])
    out_ref[...] = sum(weight * value for (_, _, weight), value in zip(pixels, found, strict=True))


def _packed_kernel(h: int, width: int, table_ref, x_ref, y_ref, out_ref) -> None:
    pixels = pixel_corners(x_ref[...] * width - 0.5, y_ref[...] * h - 0.5, h, width)
    rows, columns = (pixels[0][0], pixels[2][0]), (pixels[0][1], pixels[1][1])
    word = jnp.minimum(jnp.floor((columns[0].astype(jnp.float32) + 0.5) / WORD).astype(jnp.int32), _word_count(width) - 1)
    words = _find(table_ref, rows, [(word, row) for row in range(2)])
    bits = [found >> (31 - (column - WORD * word)) & 1 for found in words for column in columns]
    out_ref[...] = sum(weight * bit.astype(jnp.float32) for (_, _, weight), bit in zip(pixels, bits, strict=True))


def _find(table_ref, lanes: Sequence[Array], wanted: Sequence[tuple[Array, int]]) -> list[Array]:
    """table_ref[row, :, lane] for every (row, which of `lanes`) wanted."""
    registers, rounds = table_ref.shape[2] // LANES, _unrolled(table_ref.shape[2])
    inside = [lane & (LANES - 1) for lane in lanes]
    beside = [lane >> _LANE_BITS for lane in lanes]
    wanted = [(row * registers + beside[side], side) for row, side in wanted]

    def look(at: Array, found: list[Array]) -> list[Array]:
        for step in range(rounds):
            line = table_ref[at * rounds + step]
            for register in range(registers):
                values = line[:, register * LANES : (register + 1) * LANES]
                sides = [_permute(values, lane) for lane in inside]
                here = (at * rounds + step) * registers + register
                found = [jnp.where(row == here, sides[side], old) for (row, side), old in zip(wanted, found, strict=True)]
        return found

    start = [jnp.zeros(lanes[0].shape, table_ref.dtype) for _ in wanted]
    return jax.lax.fori_loop(0, table_ref.shape[0] // rounds, look, start)


def _permute(values: Array, lane: Array) -> Array:
    """[8, 128] values at the lanes [8, points], register by register."""
    parts = [lane[:, start : start + LANES] for start in range(0, lane.shape[1], LANES)]
    return jnp.concatenate([jnp.take_along_axis(values, part, axis=1, mode="promise_in_bounds") for part in parts], 1)


def _choose_kernel(
    keep: int, stages: tuple[int, int], bits_ref, x_in_ref, y_in_ref, x_out_ref, y_out_ref, move_ref, x_ref, y_ref
) -> None:
    """`move_ref` says how far each candidate must still move to the left: 0 for one that has arrived or does not stay."""
    registers = bits_ref.shape[1] // LANES
    at = lambda register: pl.ds(pl.multiple_of(register * LANES, LANES), LANES)  # noqa: E731
    lane = jax.lax.broadcasted_iota(jnp.int32, (MAPS, LANES), 1)

    def loop(visit: Callable, state: Any) -> Any:
        def some(n: Array, state: Any) -> Any:
            for step in range(MOVED):
                state = visit(n * MOVED + step, state)
            return state

        return jax.lax.fori_loop(0, registers // MOVED, some, state)

    def smaller(limit: Array) -> Array:
        """How many magnitudes are below a limit, [8, 1]."""
        count = lambda n, total: total + (bits_ref[:, at(n)] < limit).astype(jnp.int32)  # noqa: E731
        return loop(count, jnp.zeros((MAPS, LANES), jnp.int32)).sum(1, keepdims=True)

    def decide(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        higher = state[0] | jnp.left_shift(1, 30 - step)
        found = smaller(higher)
        return jnp.where(found < keep, higher, state[0]), jnp.where(found < keep, found, state[1])

    # The largest magnitude that stays, and how many are smaller.
    limit, sure = jax.lax.fori_loop(0, 31, decide, (jnp.zeros((MAPS, 1), jnp.int32),) * 2)
    room = keep - sure

    def rank(n: Array, before: Array) -> Array:
        """Counts, in one integer, those below the limit and, from bit 16 on, those at it."""
        bits = bits_ref[:, at(n)]
        below, tied = bits < limit, bits == limit
        counts = below.astype(jnp.int32) + (tied.astype(jnp.int32) << 16)
        for shift in (1, 2, 4, 8, 16, 32, 64):
            counts += jnp.where(lane >= shift, pltpu.roll(counts, shift, 1), 0)
        counts += before
        ties = jax.lax.shift_right_logical(counts, 16)
        stays = below | (tied & (ties <= room))
        gone = n * LANES + lane + 1 - (counts & 0xFFFF) - jnp.minimum(ties, room)
        move_ref[:, at(n)] = jnp.where(stays, gone, 0)
        x_ref[:, at(n)], y_ref[:, at(n)] = x_in_ref[:, at(n)], y_in_ref[:, at(n)]
        return counts[:, LANES - 1 :]

    loop(rank, jnp.zeros((MAPS, 1), jnp.int32))

    refs = move_ref, x_ref, y_ref

    def move(stage: Array, inside: bool) -> None:
        """Moves by 2 ** stage lanes, or registers. The place that a candidate has left holds one that does not stay."""
        distance = jnp.left_shift(1, stage)
        bit = stage if inside else stage + _LANE_BITS

        def arriving(register: Array | int) -> list[Array]:
            register = jnp.minimum(register, registers - 1)
            found = [ref[:, at(register)] for ref in refs]
            return [pltpu.roll(x, LANES - distance, 1) for x in found] if inside else found

        def visit(n: Array, now: list[Array] | None) -> list[Array] | None:
            if inside:
                after, near = arriving(n + 1), lane < LANES - distance
                new = [jnp.where(near, a, b) for a, b in zip(now, after, strict=True)]
                there = near | (n + 1 < registers)
            else:
                after, new, there = None, arriving(n + distance), n + distance < registers
            own = [ref[:, at(n)] for ref in refs]
            comes = (new[0] >> bit & 1 == 1) & there
            stays = jnp.where(own[0] >> bit & 1 == 1, 0, own[0])
            for ref, moved, kept in zip(refs, new, (stays, *own[1:]), strict=True):
                ref[:, at(n)] = jnp.where(comes, moved, kept)
            return after

        loop(visit, arriving(0) if inside else None)

    for inside, count in zip((True, False), stages, strict=True):
        if count:
            jax.lax.fori_loop(0, count, lambda stage, _, inside=inside: move(stage, inside), None)
    x_out_ref[...], y_out_ref[...] = x_ref[:, : x_out_ref.shape[1]], y_ref[:, : y_out_ref.shape[1]]


def _metadata(name: str, steps: int, bodies: Sequence[int]) -> dict[str, str]:
    """What a plan prices the kernel by (`aot.pricing`)."""
    return {"kernel": name, "steps": str(steps), "bodies": " ".join(map(str, bodies))}


def _pad(x: Array, axis: int, multiple: int, fill: int = 0) -> Array:
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)
