"""The depthwise implementation against float64 convolution: every direction, format, type and instruction set, at sizes around the tiles' edges."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from faltung import config
from faltung.codegen.compile import compile_object
from faltung.codegen.numeric import Numeric
from faltung.cpu.depthwise import DEPTHWISE, Spec, emit_gather
from faltung.cpu.depthwise_few import takes_few
from faltung.cpu.depthwise_geometry import lines
from faltung.cpu.depthwise_products import Edges, Shape
from faltung.cpu.depthwise_taps import Reach, block_pixels
from faltung.cpu.depthwise_tile import Lanes
from faltung.cpu.depthwise_weight import Spec as WeightSpec
from faltung.cpu.depthwise_weight import emit_weight
from faltung.cpu.target import TARGETS, use_target
from faltung.dispatch import Unsupported
from faltung.problem import DIRECTIONS, FORMATS, PADDING_MODES, ConvProblem
from instruction_sets import each_isa

TORCH_TYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
MEMORY = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# Channels around one vector and several, widths around a transposed block, register blocks and their overlap; every stride, dilation and padding.
TABLE = (
    "n2c16h10w20k16r3s3 p1 g16 bias",
    "n2c17h7w7k17r3s3 p1 g17 bias",
    "n1c5h9w33k5r5s3 p0,3,1,2 g5 bias",
    "n1c16h12w13k16r3s3 st2 p1 g16",
    "n1c7h12w12k7r3s3 d2 p2 g7",
    "n1c37h12w13k37r3s4 st2x3 d3x2 p4 g37",
    "n1c6h8w9k12r3s3 p1 g6 bias",
    "n2c16h8w9k48r3s3 st2 p1 g16 bias",
    "n1c3h7w6k3r1s1 st2 g3",
    "n1c4h5w5k4r2s2 st3 g4 bias",
    "n1c3h5w5k3r1s1 st7 p3 g3",
    "n1c33h24w24k33r7s7 p3 g33 bias",
    "n3c32h1w1k32r1s1 g32 bias",
    "n1c48h16w31k48r3s3 st2 p1 g48 bias",
    "n1c2h17w15k2r4s4 p1,2,2,1 st3 d2 g2",
    "n2c144h6w29k144r3s3 p1 g144",
)
# nhwc with fewer channels than lanes: one, two and three periods of weights, rows of less than a vector, of several blocks, every padding
FEW = (
    "n2c3h9w11k3r3s3 p1 g3 bias",
    "n2c2h9w31k2r1s9 p0x4 g2",
    "n1c2h3w1k2r3s1 p1x0 g2 bias",
    "n1c3h40w131k3r11s5 p5,0,3,2 d1x2 g3",
    "n2c6h9w67k6r5s2 p2,1,1,0 reflect g6 bias",
    "n2c5h9w31k5r5s5 p2 replicate g5",
    "n1c4h9w31k4r2s3 p3 circular g4 bias",
    "n1c7h8w40k7r3s3 g7",
    "n3c3h6w50k3r3s3 p7 d3 g3",
)
LARGE = (
    "n1c16h40w41k16r31s31 p15 g16",
    "n1c9h33w18k9r13s21 p7 g9 bias",
    "n1c8h64w200k8r3s3 p1 g8",
    "n1c17h9w1100k17r3s3 st2 p1 g17",
)


@pytest.fixture(autouse=True)
def one_thread_for_torch() -> Iterator[None]:
    """The oracle's problems are too small for threads; the kernels under test start their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def variants(texts: tuple[str, ...], dtypes: tuple[str, ...], modes: tuple[str, ...]) -> list[ConvProblem]:
    problems = []
    for text in texts:
        for mode in modes:
            base = replace(ConvProblem.parse(text), padding_mode=mode)
            left, right, top, bottom = base.padding
            if mode != "zeros" and (max(base.padding) == 0 or max(left, right) >= base.w or max(top, bottom) >= base.h):
                continue
            for direction in DIRECTIONS:
                if direction == "grad_input" and mode != "zeros":
                    continue
                bias = base.epilogue.bias and direction != "grad_input"
                problems += [replace(base, dtype=d, format=fmt).with_direction(direction, bias=bias) for d in dtypes for fmt in FORMATS]
    return problems


def operands(problem: ConvProblem, integer: bool) -> tuple[torch.Tensor, ...]:
    """Input, weight, bias, gradient of the output."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape: int) -> torch.Tensor:
        values = torch.randint(-2, 3, shape, generator=generator) if integer else torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(TORCH_TYPES[problem.dtype])

    memory = MEMORY[problem.format]
    x, w, b, g = make(*problem.input_shape), make(*problem.weight_shape), make(problem.k), make(*problem.output_shape)
    return x.contiguous(memory_format=memory), w, b, g.contiguous(memory_format=memory)


def wanted(problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, g: torch.Tensor, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """What torch computes in ``dtype``."""
    x, w, b = (t.detach().to(dtype).requires_grad_() for t in (x, w, b))
    padded = F.pad(x, problem.padding, mode={"zeros": "constant"}.get(problem.padding_mode, problem.padding_mode))
    y = F.conv2d(padded, w, b if problem.epilogue.bias else None, problem.stride, 0, problem.dilation, problem.g)
    if problem.direction == "forward":
        return [y.detach()]
    y.backward(g.to(dtype))
    if problem.direction == "grad_input":
        return [x.grad]
    return [w.grad, b.grad] if problem.epilogue.bias else [w.grad]


def computed(problem: ConvProblem, tensors: tuple[torch.Tensor, ...], threads: int) -> list[torch.Tensor]:
    """What the implementation computes, into outputs that start as NaN."""
    x, w, b, g = tensors
    dtype = TORCH_TYPES[problem.dtype]
    plan = DEPTHWISE.plan(problem, threads)

    def blank(shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.full(shape, float("nan"), dtype=dtype)
        return out.contiguous(memory_format=MEMORY[problem.format]) if len(shape) == 4 else out

    if problem.direction == "forward":
        outputs = [blank(problem.output_shape)]
        plan.launch(x.data_ptr(), w.data_ptr(), b.data_ptr() if problem.epilogue.bias else 0, outputs[0].data_ptr())
    elif problem.direction == "grad_input":
        outputs = [blank(problem.input_shape)]
        plan.launch(g.data_ptr(), w.data_ptr(), 0, outputs[0].data_ptr())
    else:
        outputs = [torch.full(problem.weight_shape, float("nan"), dtype=dtype)]
        if problem.epilogue.bias:
            outputs.append(blank((problem.k,)))
        plan.launch(x.data_ptr(), g.data_ptr(), outputs[1].data_ptr() if problem.epilogue.bias else 0, outputs[0].data_ptr())
    return outputs


def check_exact(problem: ConvProblem) -> None:
    """Small integers are summed without rounding, so the result is exact, and the same for one thread and two."""
    tensors = operands(problem, integer=True)
    with config.override(poison=True):
        two, one = computed(problem, tensors, 2), computed(problem, tensors, 1)
    for got, other, want in zip(two, one, wanted(problem, *tensors)):
        assert torch.equal(got, other), f"{problem}: one thread and two differ"
        assert torch.equal(got.double(), want.to(got.dtype).double()), f"{problem}: largest error {(got.double() - want).abs().max()}"


@pytest.mark.parametrize("text", TABLE)
def test_exact(text: str) -> None:
    for problem in variants((text,), ("f32",), PADDING_MODES):
        check_exact(problem)


@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
def test_exact_types(dtype: str) -> None:
    for problem in variants(TABLE[::2], (dtype,), ("zeros",)):
        check_exact(problem)


@each_isa(("avx512", "avx2", "sse2"))
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("text", FEW)
def test_exact_few_channels(text: str, dtype: str, isa: str) -> None:
    with use_target(isa):
        for problem in variants((text,), (dtype,), ("zeros",)):
            few = replace(problem, padding_mode=ConvProblem.parse(text).padding_mode)
            if few.direction == "forward" or few.padding_mode == "zeros":
                check_exact(few)


def test_few_channels_fill_vectors_with_pixels() -> None:
    chosen = {text: takes_few(replace(ConvProblem.parse(text), format="nhwc"), TARGETS["avx2"]) for text in FEW}
    assert chosen == dict.fromkeys(FEW, True)
    for text in ("nhwc n1c8h8w8k8r3s3 g8", "nhwc n1c3h8w8k6r3s3 g3", "n1c3h8w8k3r3s3 g3", "nhwc n1c3h9w9k3r3s3 st2 g3", "grad_input nhwc n1c3h8w8k3r3s3 p3 g3"):
        assert not takes_few(ConvProblem.parse(text), TARGETS["avx2"])


@pytest.mark.parametrize("text", LARGE)
def test_exact_large(text: str) -> None:
    for problem in variants((text,), ("f32",), ("zeros", "circular")):
        check_exact(problem)


@each_isa(("avx2", "sse2"))
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_exact_targets(isa: str, dtype: str) -> None:
    with use_target(isa):
        for problem in variants(TABLE[:7] if dtype == "f32" else TABLE[1:4], (dtype,), ("zeros",)):
            check_exact(problem)


@pytest.mark.parametrize(
    "text", ["n2c32h56w56k32r3s3 p1 g32 bias", "n2c24h30w31k24r7s7 p3 g24 bias", "n1c16h40w40k16r31s31 p15 g16 bias", "n1c3h40w40k3r15s15 p7 g3"]
)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_error_at_most_twice_torchs(text: str, dtype: str) -> None:
    ulp = torch.finfo(TORCH_TYPES[dtype]).eps
    for problem in variants((text,), (dtype,), ("zeros",)):
        tensors = operands(problem, integer=False)
        exact = wanted(problem, *tensors)
        if dtype == "f64":  # nothing finer to compare with: near to torch's own result
            for got, want in zip(computed(problem, tensors, 2), exact):
                assert (got - want).abs().max() <= 64 * ulp * want.abs().max(), str(problem)
            continue
        for got, stock, want in zip(computed(problem, tensors, 2), wanted(problem, *tensors, dtype=TORCH_TYPES[dtype]), exact):
            mine, theirs = ((t.double() - want).norm() / want.norm() for t in (got, stock))
            assert mine <= 2 * theirs + 4 * ulp, f"{problem}: {mine:.2e}, torch {theirs:.2e}"


def test_infinity_and_nan_spread_as_in_torch() -> None:
    for fmt in FORMATS:
        problem = replace(ConvProblem.parse("n1c18h12w20k18r3s3 p1 g18"), format=fmt)
        x, w, b, g = operands(problem, integer=False)
        x[0, 3, 5, 7], x[0, 17, 11, 19] = float("nan"), float("inf")
        (got,) = computed(problem, (x, w, b, g), 1)
        (want,) = wanted(problem, x, w, b, g)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())


@contextmanager
def guarded(tensor: torch.Tensor, at_end: bool) -> Iterator[int]:
    """The address of a copy of ``tensor`` that ends (or begins) at a page that cannot be touched; the copy is read back into it afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (base, base + page + inner):
        assert libc.mprotect(edge, page, 0) == 0
    address = base + page + (inner - size if at_end else 0)
    ctypes.memmove(address, tensor.data_ptr(), size)
    yield address
    ctypes.memmove(tensor.data_ptr(), address, size)
    for edge in (base, base + page + inner):
        libc.mprotect(edge, page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("at_end", [True, False])
@each_isa(("avx512", "avx2", "sse2"))
def test_touches_only_its_operands(isa: str, at_end: bool) -> None:
    texts = ("n1c17h7w7k17r3s3 p1 g17 bias", "n1c16h9w20k16r3s3 st2 p1 g16 bias", "n1c3h6w33k6r5s5 p2 g3 bias", "n1c5h3w2k5r3s3 p1 g5 bias")
    with use_target(isa):
        for problem in variants(texts, ("f32", "f16"), ("zeros", "replicate")):
            x, w, b, g = operands(problem, integer=True)
            forward, weight = problem.direction == "forward", problem.direction == "grad_weight"
            out = torch.full(problem.result_shape, float("nan"), dtype=x.dtype)
            out = out if weight else out.contiguous(memory_format=MEMORY[problem.format])
            plan = DEPTHWISE.plan(problem, 1)
            bias = b if forward else torch.full_like(b, float("nan"))
            with (
                guarded(g if problem.direction == "grad_input" else x, at_end) as source,
                guarded(g if weight else w, at_end) as other,
                guarded(bias, at_end) as third,
                guarded(out, at_end) as target,
            ):
                plan.launch(source, other, third if problem.epilogue.bias else 0, target)
            results = [out, bias] if weight and problem.epilogue.bias else [out]
            for got, want in zip(results, wanted(problem, x, w, b, g)):
                assert torch.equal(got.double(), want.to(got.dtype).double()), str(problem)


@pytest.mark.parametrize("width", [3, 5, 9, 14, 15, 19, 23])
def test_rows_read_from_memory(width: int) -> None:
    """Blocks at both ends of a row leave out what lies outside: rows of one block, with a short last block, with phases of unlike lengths."""
    for sizes in ("r3s3 p1", "r3s3 st2 p1", "r3s5 st1x2 p1,2,1,0", "r7s7 p3"):
        text = f"n2c40h6w{width}k40{sizes} g40 bias"
        for problem in variants((text,), ("f32",), ("zeros",)) + variants((text,), ("bf16",), ("zeros",)):
            if problem.format == "nhwc":
                check_exact(problem)


@pytest.mark.parametrize("sizes", ["c90h5w9k90r3s3 st2 p1 g90", "c70h6w23k70r5s5 st2 p2 g70", "c512h4w17k512r3s3 p1 g512", "c150h7w7k150r3s5 st1x2 p1x2 g150"])
def test_vectors_abreast(sizes: str) -> None:
    """Blocks of several vectors of channels: with single ones and a partial one behind them."""
    for dtype in ("f32", "f64", "bf16", "f16"):
        for problem in variants((f"n1{sizes} bias",), (dtype,), ("zeros",)):
            if problem.format == "nhwc" and problem.direction == "forward":
                check_exact(problem)


_IMAGES = ("h1w1", "h3w5", "h4w4", "h1w17", "h7w7", "h14w14", "h5w31", "h5w32", "h3w40")


@pytest.mark.parametrize("image", _IMAGES)
def test_images_transposed_whole(image: str) -> None:
    """nchw: images of fewer pixels than lanes, of as many and of more, and on both sides of the width from which on rows are transposed one by one.

    Kernels of another type than float32 are run by turns: every type meets every image, and every kind of layer.
    """
    for turn, sizes in enumerate(("r3s3 p1", "r3s3 st2 p1", "r5s3 p2 d1x2", "r13s13 p6")):
        for dtype in ("f32", ("f64", "bf16", "f16")[(turn + _IMAGES.index(image)) % 3]):
            for problem in variants((f"n2c20{image}k20{sizes} g20 bias",), (dtype,), ("zeros",)):
                if problem.format == "nchw" and problem.direction != "grad_weight":
                    check_exact(problem)
    for problem in variants((f"n2c9{image}k18r3s3 p1 g9 bias",), ("f32", "bf16"), ("zeros",)):
        if problem.format == "nchw" and problem.direction == "forward":
            check_exact(problem)


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize("columns", [2, 3, 5, 7])
@pytest.mark.parametrize(("step", "abreast"), [(1, 1), (2, 1), (1, 4), (2, 4), (2, 2)])
def test_blocks_reach_one_end_each(step: int, abreast: int, columns: int, count: int) -> None:
    target, reach = TARGETS["avx512"], Reach(columns, columns // 2, columns // 2, True)
    left, right = reach.pixels(step)
    block = block_pixels(target, count, columns, lambda size: reach.fits(target, count, size, step), abreast)
    if block in (0, count):
        return
    assert left <= block <= count - right, "the first block"
    assert right <= block <= count - left, "the last one"
    if count > 2 * block:
        assert left <= count - block - right, "the last one of the middle, which is moved back"


def test_bits_do_not_depend_on_threads() -> None:
    for problem in variants(("n3c40h30w30k40r5s5 p2 g40 bias", "n2c32h28w28k32r3s3 st2 p1 g32 bias"), ("f32", "bf16"), ("zeros",)):
        tensors = operands(problem, integer=False)
        first = computed(problem, tensors, 1)
        for threads in (2, 3):
            assert all(torch.equal(a, b) for a, b in zip(first, computed(problem, tensors, threads))), str(problem)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_generates_for_neon(fmt: str, dtype: str) -> None:
    target = TARGETS["neon"]
    shape = Shape.choose(target, 3, 3, 28, 1, 1)
    assert shape is not None
    for whole in (False, True) if fmt == "nhwc" else (False,):
        lanes = Lanes(Numeric(dtype, target), fmt, "same", tail=not whole)
        columns = (Reach(1, 0, 1, whole), Reach(3, 1, 1, whole))
        assert len(compile_object(str(emit_gather(Spec(lanes, columns, 6, 1, 1, bias=True, direct=whole, ahead=whole))), target)) > 1000
        edges = Edges.of(28, shape.pixels, 1, 1, 1) if whole else None
        assert len(compile_object(str(emit_weight(WeightSpec(lanes, lanes, shape, bias=True, direct=whole, edges=edges, at_once=whole))), target)) > 1000


def test_refusals() -> None:
    for text in ("n1c8h8w8k8r3s3", "n1c8h8w8k8r3s3 g4", "n1c1h8w8k4r3s3", "n0c8h8w8k8r3s3 g8", "grad_input n1c8h8w8k8r3s3 p1 g8 reflect"):
        with pytest.raises(Unsupported):
            DEPTHWISE.plan(ConvProblem.parse(text), 1)


@pytest.mark.parametrize(("stride", "dilation", "kernel"), [(1, 1, 3), (2, 1, 3), (2, 2, 3), (3, 2, 4), (4, 6, 5), (7, 1, 1)])
def test_phases_cover_every_tap_once(stride: int, dilation: int, kernel: int) -> None:
    problem = ConvProblem(1, 2, 23, 19, 2, kernel, kernel, (stride, stride), (2, 1, 3, 2), (dilation, dilation), 2, direction="grad_input")
    for line, size, outputs, before in zip(lines(problem, False), (23, 19), (problem.p, problem.q), (3, 2)):
        found = set()
        for phase in line.phases:
            for i in range(phase.count):
                for j, tap in enumerate(phase.taps):
                    entry = i * line.step + phase.shift + j * line.spacing
                    found.add((phase.start + i * line.output_step, tap, line.base + entry * line.unit))
        want = {(o * stride + t * dilation - before, t, o) for o in range(outputs) for t in range(kernel) if 0 <= o * stride + t * dilation - before < size}
        assert want == {f for f in found if 0 <= f[2] < outputs}
