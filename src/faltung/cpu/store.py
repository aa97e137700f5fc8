"""From accumulators in scratch to the output: conversion to the element type, memory format, interleaving of phases.

Two scratch layouts: *panel* ``[pixel][width]`` (vectors ran over channels) and *plane* ``[channel][pixel]`` (vectors ran over pixels).
Pitches count bytes.
"""

from __future__ import annotations

from ..codegen.emit import Function, Module, Scalar, Value, vector_type
from ..codegen.numeric import Numeric

__all__ = ["emit_store_panel", "emit_store_plane"]


def _write_run(f: Function, numeric: Numeric, source: Value, target: Value, count: Value) -> None:
    """``count`` neighbouring elements from scratch (readable one vector past the end) to memory."""
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes

    def read(i: Value, count_lanes: int) -> Value:
        return f.load(source + i * size, numeric.vector if count_lanes == lanes else numeric.compute)

    whole = f.integer("and", count, -lanes)
    f.loop(0, whole, lanes, lambda i: numeric.store(f, read(i, lanes), target + i * memory, lanes))
    if numeric.target.masks:
        with f.when(whole < count):
            numeric.store(f, read(whole, lanes), target + whole * memory, lanes, f.lane_mask(count - whole, lanes))
    else:
        f.loop(whole, count, 1, lambda i: numeric.store(f, read(i, 1), target + i * memory, 1))


def emit_store_panel(module: Module, numeric: Numeric, out_format: str) -> Function:
    """``store_panel(scratch, out, rows, columns, valid, width, scratch_row, out_row, out_column, out_channel)``.

    ``valid`` of the panel's ``width`` channels are written, for ``rows`` x ``columns`` pixels.
    """
    names = ("rows", "columns", "valid", "width", "scratch_row", "out_row", "out_column", "out_channel")
    f = module.function("store_panel", [("ptr", "scratch"), ("ptr", "out"), *(("i64", n) for n in names)])
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    pixel = f["width"] * size

    def row(p: Value) -> None:
        source, target = f["scratch"] + p * f["scratch_row"], f["out"] + p * f["out_row"]
        if out_format == "nhwc":
            f.loop(0, f["columns"], 1, lambda q: _write_run(f, numeric, source + q * pixel, target + q * f["out_column"], f["valid"]))
            return

        def transposed(whole: bool) -> None:
            def block(q: Value) -> None:
                if whole:
                    # The last block begins early: without cheap masks a masked store takes 12 cycles and more, and 1x1 layers up to 1.8 times as long.
                    q, mask = f.minimum(q, f["columns"] - lanes), None
                else:
                    mask = f.lane_mask(f["columns"] - q, lanes)

                def channel_block(k: Value) -> None:
                    loaded = [f.load(source + (q + i) * pixel + k * size, numeric.vector) for i in range(lanes)]
                    for i, vector in enumerate(f.transpose(loaded)):
                        with f.when(k + i < f["valid"]):
                            numeric.store(f, vector, target + (k + i) * f["out_channel"] + q * memory, lanes, mask)

                f.loop(0, f["valid"], lanes, channel_block)

            f.loop(0, f["columns"], lanes, block)

        def single(start: Scalar = 0) -> None:
            def channel(k: Value) -> None:
                plane = target + k * f["out_channel"]

                def pixel_body(q: Value) -> None:
                    value = f.load(source + q * pixel + k * size, numeric.compute)
                    numeric.store(f, value, plane + q * f["out_column"], 1)

                f.loop(start, f["columns"], 1, pixel_body)

            f.loop(0, f["valid"], 1, channel)

        def blocks() -> None:
            if numeric.target.masks:
                transposed(False)
            else:
                f.branch(f["columns"] >= lanes, lambda: transposed(True), lambda: transposed(False))

        def apart() -> None:
            seconds = f.integer("and", f["columns"] > lanes, f["out_column"].equals(2 * memory))
            f.branch(seconds, lambda: single(_every_second(f, numeric, source, target)), single)

        f.branch(f["out_column"].equals(memory), blocks, apart)

    f.loop(0, f["rows"], 1, row)
    f.ret()
    return f


def _every_second(f: Function, numeric: Numeric, source: Value, target: Value) -> Value:
    """One row of ``store_panel`` into every second pixel of nchw, but for the last pixel: how many are done.

    Two vectors of a row are read, one phase's pixels replaced in them, and written back: the others' are the same task's, since another pixel of this phase
    follows.
    """
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    pixel, raw_type = f["width"] * size, vector_type(numeric.memory, lanes)

    def block(q: Value) -> None:
        q = f.minimum(q, f["columns"] - (lanes + 1))

        def channel_block(k: Value) -> None:
            loaded = [f.load(source + (q + i) * pixel + k * size, numeric.vector) for i in range(lanes)]
            for i, vector in enumerate(f.transpose(loaded)):
                with f.when(k + i < f["valid"]):
                    place, raw = target + (k + i) * f["out_channel"] + q * (2 * memory), numeric.narrow(f, vector, lanes)
                    for half in range(2):
                        at = place + half * lanes * memory
                        mixed = [lanes + lane if lane % 2 else (half * lanes + lane) // 2 for lane in range(lanes)]
                        f.store(f.shuffle(raw, f.load(at, raw_type), mixed), at)

        f.loop(0, f["valid"], lanes, channel_block)

    done = f["columns"] - 1
    f.loop(0, done, lanes, block)
    return done


def emit_store_plane(module: Module, numeric: Numeric, out_format: str, phases: int) -> Function:
    """``store_plane(scratch, out, rows, columns, channels, scratch_channel, scratch_row, scratch_phase, out_row, out_column, out_channel)``.

    ``columns`` are the pixels of a row in the output, of all ``phases`` together: pixel ``x`` is entry ``x // phases`` of the scratch of
    phase ``x % phases``.
    """
    names = ("rows", "columns", "channels", "scratch_channel", "scratch_row", "scratch_phase", "out_row", "out_column", "out_channel")
    f = module.function("store_plane", [("ptr", "scratch"), ("ptr", "out"), *(("i64", n) for n in names)])
    if out_format == "nchw":
        _planes_to_nchw(f, numeric, phases)
    else:
        _planes_to_nhwc(f, numeric, phases)
    f.ret()
    return f


def _planes_to_nchw(f: Function, numeric: Numeric, phases: int) -> None:
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes

    def channel(k: Value) -> None:
        def row(p: Value) -> None:
            source = f["scratch"] + k * f["scratch_channel"] + p * f["scratch_row"]
            target = f["out"] + k * f["out_channel"] + p * f["out_row"]
            if phases == 1:
                _write_run(f, numeric, source, target, f["columns"])
                return
            start = f.value(0)
            if phases == 2:
                blocks = f["columns"] // (2 * lanes)
                second = source + f["scratch_phase"]

                def block(i: Value) -> None:
                    even = f.load(source + i * (lanes * size), numeric.vector)
                    odd = f.load(second + i * (lanes * size), numeric.vector)
                    mixed = [lane // 2 + (lane % 2) * lanes for lane in range(2 * lanes)]
                    place = target + i * (2 * lanes * memory)
                    numeric.store(f, f.shuffle(even, odd, mixed[:lanes]), place, lanes)
                    numeric.store(f, f.shuffle(even, odd, mixed[lanes:]), place + lanes * memory, lanes)

                f.loop(0, blocks, 1, block)
                start = blocks * (2 * lanes)

            def single(x: Value) -> None:
                entry = source + (x % phases) * f["scratch_phase"] + (x // phases) * size
                numeric.store(f, f.load(entry, numeric.compute), target + x * memory, 1)

            f.loop(start, f["columns"], 1, single)

        f.loop(0, f["rows"], 1, row)

    f.loop(0, f["channels"], 1, channel)


def _planes_to_nhwc(f: Function, numeric: Numeric, phases: int) -> None:
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    last = f["channels"] - 1

    def row(p: Value) -> None:
        target = f["out"] + p * f["out_row"]
        for phase in range(phases):
            source = f["scratch"] + p * f["scratch_row"] + f["scratch_phase"] * phase
            columns = (f["columns"] + (phases - 1 - phase)) // phases

            def block(q: Value, source: Value = source, columns: Value = columns, phase: int = phase) -> None:
                def channel_block(k: Value) -> None:
                    mask = f.lane_mask(f["channels"] - k, lanes)
                    planes = [f.minimum(k + i, last) * f["scratch_channel"] for i in range(lanes)]
                    loaded = [f.load(source + plane + q * size, numeric.vector) for plane in planes]
                    for i, vector in enumerate(f.transpose(loaded)):
                        with f.when(q + i < columns):
                            place = target + ((q + i) * phases + phase) * f["out_column"] + k * memory
                            numeric.store(f, vector, place, lanes, mask)

                f.loop(0, f["channels"], lanes, channel_block)

            f.loop(0, columns, lanes, block)

    f.loop(0, f["rows"], 1, row)
