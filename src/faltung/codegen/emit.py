"""An emitter of LLVM IR text: typed values, loops in SSA form, vectors, masked tails, conversions.

It imports neither torch nor llvmlite.  Code is emitted in SSA form with explicit phis, so that no IR pass is needed before code
generation (IR passes bought no measurable speed, and cost most of the compile time).

Integers are 64 bits wide and pointers are plain addresses: ``pointer + offset`` counts bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

__all__ = ["FLOAT_BYTES", "Function", "Module", "Scalar", "Value", "vector_type"]

FLOAT_BYTES = {"float": 4, "double": 8, "half": 2, "i16": 2, "i64": 8, "i32": 4, "i8": 1}
_CALLED = re.compile(r"@([\w.]+)\(")
_BITS = {"float": 32, "double": 64, "half": 16, "i16": 16, "i32": 32, "i64": 64, "i8": 8, "i1": 1}


def vector_type(element: str, lanes: int) -> str:
    """The type of a vector, or of its element where ``lanes`` is 1."""
    return element if lanes == 1 else f"<{lanes} x {element}>"


def _split(type_: str) -> tuple[str, int]:
    if not type_.startswith("<"):
        return type_, 1
    lanes, element = type_[1:-1].split(" x ")
    return element, int(lanes)


def _mangled(type_: str) -> str:
    element, lanes = _split(type_)
    name = {"float": "f32", "double": "f64", "half": "f16"}.get(element, element)
    return name if lanes == 1 else f"v{lanes}{name}"


class Value:
    """An SSA value: its text, its type, and the function that it lives in."""

    __slots__ = ("function", "text", "type")

    def __init__(self, function: Function, text: str, type_: str) -> None:
        self.function, self.text, self.type = function, text, type_

    def __str__(self) -> str:
        return f"{self.type} {self.text}"

    def __add__(self, other: Scalar) -> Value:
        if self.type == "ptr":
            return self.function.offset(self, other)
        return self.function.integer("add", self, other)

    __radd__ = __add__

    def __sub__(self, other: Scalar) -> Value:
        return self.function.integer("sub", self, other)

    def __rsub__(self, other: int) -> Value:
        return self.function.integer("sub", other, self)

    def __mul__(self, other: Scalar) -> Value:
        return self.function.integer("mul", self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Scalar) -> Value:
        return self.function.integer("sdiv", self, other)

    def __mod__(self, other: Scalar) -> Value:
        return self.function.integer("srem", self, other)

    def __lt__(self, other: Scalar) -> Value:
        return self.function.compare("slt", self, other)

    def __le__(self, other: Scalar) -> Value:
        return self.function.compare("sle", self, other)

    def __gt__(self, other: Scalar) -> Value:
        return self.function.compare("sgt", self, other)

    def __ge__(self, other: Scalar) -> Value:
        return self.function.compare("sge", self, other)

    def equals(self, other: Scalar) -> Value:
        return self.function.compare("eq", self, other)


Scalar: TypeAlias = "Value | int"


class Module:
    """A collection of functions that prints as one module of LLVM IR."""

    def __init__(self) -> None:
        self._functions: dict[str, Function] = {}
        self._declarations: dict[str, str] = {}
        self._memory: dict[str, int] = {}

    def function(self, name: str, parameters: Sequence[tuple[str, str]], *, result: str = "void", public: bool = False) -> Function:
        """A new function; ``parameters`` are ``(type, name)``.  Finished by its own ``ret``."""
        if name in self._functions:
            raise ValueError(f"the function {name} was already emitted")
        function = Function(self, name, parameters, result, public)
        self._functions[name] = function
        return function

    def has(self, name: str) -> bool:
        return name in self._functions

    def declare(self, name: str, signature: str) -> None:
        self._declarations[name] = signature

    def memory(self, name: str, byte_count: int) -> None:
        """Zeroed memory ``@name`` that all calls share."""
        self._memory[name] = byte_count

    @property
    def entry(self) -> Function:
        """The one public function."""
        (found,) = (f for f in self._functions.values() if f.public)
        return found

    @property
    def divisible(self) -> bool:
        """Whether its functions may be compiled one by one: not where they share memory."""
        return not self._memory

    def __str__(self) -> str:
        memory = "".join(f"@{name} = internal global [{size} x i8] zeroinitializer, align 64\n" for name, size in sorted(self._memory.items()))
        declarations = "".join(f"declare {signature}\n" for _, signature in sorted(self._declarations.items()))
        return memory + declarations + "\n".join(str(f) for f in self._functions.values())

    def unit(self, function: Function, symbols: Mapping[str, str]) -> str:
        """A module of ``function`` alone, made public, and those that belong to it; what they call is declared by its name in ``symbols``."""
        inside = {function.name: function, **function.parts}
        bodies = "\n".join(f.text(f is function, symbols) for f in inside.values())
        called = {callee.name: callee for f in inside.values() for callee in f.callees.values() if callee.name not in inside}
        declared = [signature for name, signature in sorted(self._declarations.items()) if f"@{name}(" in bodies]
        declared += [f"{f.result} @{symbols[name]}({', '.join(f.parameter_types)}) nounwind nonlazybind" for name, f in sorted(called.items())]
        return "".join(f"declare {signature}\n" for signature in declared) + bodies


class Function:
    """A function under construction."""

    def __init__(self, module: Module, name: str, parameters: Sequence[tuple[str, str]], result: str, public: bool) -> None:
        self.module, self.name, self.result, self.public = module, name, result, public
        self._lines: list[str] = []
        self._entry: list[str] = []
        self._count = 0
        self.block = "entry"
        self._mask_counts: dict[str, Value] = {}
        self._parameters = list(parameters)
        self.arguments = {n: Value(self, f"%{n}", t) for t, n in parameters}
        self.callees: dict[str, Function] = {}
        self.parts: dict[str, Function] = {}
        """Functions that nothing else calls, and that are compiled together with it."""

    def __str__(self) -> str:
        return self.text(self.public, {})

    def text(self, public: bool, symbols: Mapping[str, str]) -> str:
        """Its definition; functions that it calls go by their names in ``symbols``, where they have one there."""
        parameters = ", ".join(f"{t} %{n}" for t, n in self._parameters)
        linkage = "" if public else "internal "
        body = "\n".join(self._entry + self._lines)
        if symbols:
            body = _CALLED.sub(lambda found: f"@{symbols.get(found[1], found[1])}(", body)
        return f"define {linkage}{self.result} @{self.name}({parameters}) nounwind {{\nentry:\n{body}\n}}\n"

    @property
    def parameter_types(self) -> list[str]:
        return [t for t, _ in self._parameters]

    def __getitem__(self, name: str) -> Value:
        return self.arguments[name]

    # -- plumbing

    def _fresh(self, hint: str = "v") -> str:
        self._count += 1
        return f"%{hint}{self._count}"

    def line(self, text: str) -> None:
        self._lines.append("  " + text)

    def define(self, type_: str, instruction: str, hint: str = "v") -> Value:
        name = self._fresh(hint)
        self.line(f"{name} = {instruction}")
        return Value(self, name, type_)

    def value(self, scalar: Scalar, type_: str = "i64") -> Value:
        return scalar if isinstance(scalar, Value) else Value(self, str(scalar), type_)

    def constant(self, number: float, type_: str) -> Value:
        """A floating-point constant, exact (written as the bits of a double), splatted for a vector type."""
        element, lanes = _split(type_)
        if element == "half":
            raise ValueError("constants of type half are not emitted; convert from float")
        text = "0x" + struct.pack(">d", number).hex().upper()
        return Value(self, text if lanes == 1 else f"splat ({element} {text})", type_)

    def zero(self, type_: str) -> Value:
        return Value(self, "zeroinitializer" if type_.startswith("<") else {"ptr": "null", "i64": "0", "i32": "0"}.get(type_, "0.0"), type_)

    # -- integers and pointers

    def integer(self, operation: str, left: Scalar, right: Scalar) -> Value:
        """``left operation right`` on integers; constants are folded where that is free."""
        if isinstance(right, int):
            if right == 0 and operation in ("add", "sub", "shl", "lshr", "ashr", "or") and isinstance(left, Value):
                return left
            if right == 1 and operation in ("mul", "sdiv") and isinstance(left, Value):
                return left
            if right == 0 and operation == "mul":
                return self.value(0)
        type_ = left.type if isinstance(left, Value) else right.type if isinstance(right, Value) else "i64"
        return self.define(type_, f"{operation} {type_} {self._text(left)}, {self._text(right)}")

    @staticmethod
    def _text(scalar: Scalar) -> str:
        return scalar.text if isinstance(scalar, Value) else str(scalar)

    def compare(self, condition: str, left: Scalar, right: Scalar) -> Value:
        type_ = left.type if isinstance(left, Value) else right.type if isinstance(right, Value) else "i64"
        lanes = _split(type_)[1]
        return self.define(vector_type("i1", lanes), f"icmp {condition} {type_} {self._text(left)}, {self._text(right)}")

    def select(self, condition: Value, yes: Scalar, no: Scalar) -> Value:
        left = self.value(yes)
        right = self.value(no, left.type)
        return self.define(left.type, f"select {condition}, {left}, {right}")

    def minimum(self, left: Scalar, right: Scalar) -> Value:
        return self.select(self.compare("slt", left, right), self.value(left), self.value(right))

    def maximum(self, left: Scalar, right: Scalar) -> Value:
        return self.select(self.compare("sgt", left, right), self.value(left), self.value(right))

    def offset(self, pointer: Value, byte_count: Scalar) -> Value:
        if isinstance(byte_count, int) and byte_count == 0:
            return pointer
        return self.define("ptr", f"getelementptr i8, {pointer}, i64 {self._text(byte_count)}", "p")

    def to_pointer(self, address: Value) -> Value:
        return self.define("ptr", f"inttoptr i64 {address.text} to ptr", "p")

    # -- memory

    def load(self, pointer: Value, type_: str = "i64", align: int | None = None) -> Value:
        """A load aligned to its element, not to its vector."""
        align = align or ({"ptr": 8}.get(type_) or FLOAT_BYTES[_split(type_)[0]])
        return self.define(type_, f"load {type_}, {pointer}, align {align}")

    def store(self, value: Value, pointer: Value, align: int | None = None) -> None:
        align = align or ({"ptr": 8}.get(value.type) or FLOAT_BYTES[_split(value.type)[0]])
        self.line(f"store {value}, {pointer}, align {align}")

    def load_index(self, table: Value, index: Scalar) -> Value:
        """Entry ``index`` of a table of 64-bit integers."""
        return self.load(self.offset(table, index * 8 if isinstance(index, int) else self.integer("shl", index, 3)))

    def lane_mask(self, count: Scalar, lanes: int) -> Value:
        """The mask of the first ``count`` lanes (none where it is 0 or negative, all where it is ``lanes`` or more)."""
        numbers = "<" + ", ".join(f"i64 {i}" for i in range(lanes)) + ">"
        mask = self.define(vector_type("i1", lanes), f"icmp sgt <{lanes} x i64> {self.splat(self.value(count), lanes).text}, {numbers}")
        self._mask_counts[mask.text] = self.value(count)
        return mask

    def mask_count(self, mask: Value) -> Value:
        """What :meth:`lane_mask` made a mask of."""
        return self._mask_counts[mask.text]

    def load_masked(self, pointer: Value, mask: Value, type_: str) -> Value:
        """Lanes of the mask from memory, zero elsewhere; memory behind the other lanes is not touched."""
        element, lanes = _split(type_)
        name = f"llvm.masked.load.{_mangled(type_)}.p0"
        self.module.declare(name, f"{type_} @{name}(ptr, <{lanes} x i1>, {type_})")
        align = FLOAT_BYTES[element]
        return self.define(type_, f"call {type_} @{name}(ptr align {align} {pointer.text}, {mask}, {type_} zeroinitializer)")

    def store_masked(self, value: Value, pointer: Value, mask: Value) -> None:
        element, lanes = _split(value.type)
        name = f"llvm.masked.store.{_mangled(value.type)}.p0"
        self.module.declare(name, f"void @{name}({value.type}, ptr, <{lanes} x i1>)")
        self.line(f"call void @{name}({value}, ptr align {FLOAT_BYTES[element]} {pointer.text}, {mask})")

    def prefetch(self, pointer: Value, locality: int = 3) -> None:
        """Ask for the cache line of ``pointer``; ``locality`` 3 is the first level, 2 the second."""
        self.module.declare("llvm.prefetch.p0", "void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.line(f"call void @llvm.prefetch.p0({pointer}, i32 0, i32 {locality}, i32 1)")

    def opaque(self, pointer: Value) -> Value:
        """The same address, of which the compiler does not know how it was made; no instruction comes of it."""
        name = "llvm.launder.invariant.group.p0"
        self.module.declare(name, f"ptr @{name}(ptr)")
        return self.define("ptr", f"call ptr @{name}({pointer})")

    def barrier(self) -> None:
        """No access to memory moves across, and none is shared with one on the other side; no instruction comes of it."""
        self.line('fence syncscope("singlethread") acq_rel')

    def stack(self, byte_count: int, align: int = 64) -> Value:
        """Memory on the stack for the length of the call."""
        name = self._fresh("stack")
        self._entry.append(f"  {name} = alloca [{byte_count} x i8], align {align}")
        return Value(self, name, "ptr")

    def reserve(self, byte_count: Value, align: int = 64) -> Value:
        """Memory on the stack, of a size known when the code runs, for the rest of the call; not in a loop."""
        return self.define("ptr", f"alloca i8, {byte_count}, align {align}", "stack")

    # -- floating point and vectors

    def arithmetic(self, operation: str, left: Value, right: Value) -> Value:
        return self.define(left.type, f"{operation} {left.type} {left.text}, {right.text}")

    def fadd(self, left: Value, right: Value) -> Value:
        return self.arithmetic("fadd", left, right)

    def fmul(self, left: Value, right: Value) -> Value:
        return self.arithmetic("fmul", left, right)

    def fsub(self, left: Value, right: Value) -> Value:
        return self.arithmetic("fsub", left, right)

    def fma(self, a: Value, b: Value, c: Value, fused: bool = True) -> Value:
        """``a * b + c``, with one rounding where ``fused``."""
        if not fused:
            return self.fadd(self.fmul(a, b), c)
        name = f"llvm.fma.{_mangled(a.type)}"
        self.module.declare(name, f"{a.type} @{name}({a.type}, {a.type}, {a.type})")
        return self.define(a.type, f"call {a.type} @{name}({a}, {b}, {c})")

    def splat(self, scalar: Value, lanes: int) -> Value:
        if lanes == 1:
            return scalar
        type_ = vector_type(scalar.type, lanes)
        one = self.define(type_, f"insertelement {type_} poison, {scalar}, i64 0")
        return self.define(type_, f"shufflevector {type_} {one.text}, {type_} poison, <{lanes} x i32> zeroinitializer")

    def shuffle(self, left: Value, right: Value | None, lanes: Sequence[int]) -> Value:
        """Lanes of ``left`` (and ``right``, counted on) in the order given."""
        element, _ = _split(left.type)
        indices = "<" + ", ".join(f"i32 {i}" for i in lanes) + ">"
        other = right.text if right is not None else "poison"
        return self.define(vector_type(element, len(lanes)), f"shufflevector {left}, {left.type} {other}, <{len(lanes)} x i32> {indices}")

    def extract(self, vector: Value, lane: int) -> Value:
        return self.define(_split(vector.type)[0], f"extractelement {vector}, i64 {lane}")

    def insert(self, vector: Value, scalar: Value, lane: int) -> Value:
        return self.define(vector.type, f"insertelement {vector}, {scalar}, i64 {lane}")

    def sum_lanes(self, vector: Value) -> Value:
        """The sum of all lanes, by halves (a fixed order)."""
        _, lanes = _split(vector.type)
        while lanes > 2:
            lanes //= 2
            low, high = self.shuffle(vector, None, range(lanes)), self.shuffle(vector, None, range(lanes, 2 * lanes))
            vector = self.fadd(low, high)
        return self.fadd(self.extract(vector, 0), self.extract(vector, 1)) if lanes == 2 else vector

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """``len(rows)`` vectors of as many lanes, rows and columns exchanged, in log2 steps of two-operand shuffles."""
        count = len(rows)
        result = list(rows)
        width = 1
        while width < count:
            low = [i + (count if i & width else 0) - (width if i & width else 0) for i in range(count)]
            high = [i + width if not i & width else i + count for i in range(count)]
            following: list[Value] = list(result)
            for i in range(count):
                if not i & width:
                    following[i] = self.shuffle(result[i], result[i + width], low)
                    following[i + width] = self.shuffle(result[i], result[i + width], high)
            result = following
            width *= 2
        return result

    def cast(self, operation: str, value: Value, type_: str) -> Value:
        return self.define(type_, f"{operation} {value} to {type_}")

    def call(self, callee: Function | str, arguments: Sequence[Value], result: str = "void") -> Value | None:
        """A call of an emitted function, or of an address in a value by ``callee=value.text``."""
        if isinstance(callee, Function):
            self.callees[callee.name] = callee
        name = f"@{callee.name}" if isinstance(callee, Function) else callee
        text = f"call {result} {name}({', '.join(map(str, arguments))})"
        if result == "void":
            self.line(text)
            return None
        return self.define(result, text)

    def own(self, function: Function) -> None:
        """Make an emitted function part of this one, because nothing else calls it."""
        self.parts[function.name] = function

    def address_of(self, function: Function) -> Value:
        """The address of an emitted function, which becomes a part of this one."""
        self.own(function)
        return Value(self, f"@{function.name}", "ptr")

    def load_shared(self, pointer: Value) -> Value:
        """An integer that other threads change meanwhile."""
        return self.define("i64", f"load atomic i64, {pointer} monotonic, align 8")

    def fetch_add(self, pointer: Value, amount: int) -> Value:
        return self.define("i64", f"atomicrmw add {pointer}, i64 {amount} monotonic")

    # -- control flow

    def _start(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self.block = label

    def _label(self, hint: str) -> str:
        self._count += 1
        return f"{hint}{self._count}"

    def loop(
        self,
        start: Scalar,
        stop: Scalar,
        step: Scalar,
        body: Callable[..., Sequence[Value] | None],
        initial: Sequence[Value] = (),
    ) -> list[Value]:
        """``for i in range(start, stop, step)`` with values carried from one turn to the next.

        ``body(i, *carried)`` emits one turn and returns the carried values' successors; the last ones are returned.
        """
        head, inside, after = self._label("loop"), self._label("body"), self._label("done")
        before = self.block
        self.line(f"br label %{head}")
        self._start(head)
        index = Value(self, self._fresh("i"), "i64")
        carried = [Value(self, self._fresh("c"), v.type) for v in initial]
        position = len(self._lines)
        condition = self.compare("slt", index, stop)
        self.line(f"br {condition}, label %{inside}, label %{after}")
        self._start(inside)
        following = list(body(index, *carried) or ())
        if len(following) != len(carried):
            raise ValueError(f"the loop carries {len(carried)} values, its body returned {len(following)}")
        next_index = self.integer("add", index, step)
        phis = [f"  {index.text} = phi i64 [ {self._text(start)}, %{before} ], [ {next_index.text}, %{self.block} ]"]
        for value, first, last in zip(carried, initial, following):
            phis.append(f"  {value.text} = phi {value.type} [ {first.text}, %{before} ], [ {last.text}, %{self.block} ]")
        self._lines[position:position] = phis
        self.line(f"br label %{head}")
        self._start(after)
        return carried

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Code that runs where ``condition`` holds; values made inside are not visible after it."""
        inside, after = self._label("then"), self._label("endif")
        self.line(f"br {condition}, label %{inside}, label %{after}")
        self._start(inside)
        yield
        self.line(f"br label %{after}")
        self._start(after)

    def branch(self, condition: Value, yes: Callable[[], object], no: Callable[[], object]) -> None:
        """One of two pieces of code."""
        left, right, after = self._label("then"), self._label("else"), self._label("endif")
        self.line(f"br {condition}, label %{left}, label %{right}")
        self._start(left)
        yes()
        self.line(f"br label %{after}")
        self._start(right)
        no()
        self.line(f"br label %{after}")
        self._start(after)

    def choose(self, condition: Value, yes: Callable[[], Value], no: Callable[[], Value]) -> Value:
        """The value of one of two pieces of code."""
        found: list[tuple[Value, str]] = []

        def keep(make: Callable[[], Value]) -> Callable[[], None]:
            return lambda: found.append((make(), self.block))

        self.branch(condition, keep(yes), keep(no))
        ways = ", ".join(f"[ {value.text}, %{block} ]" for value, block in found)
        return self.define(found[0][0].type, f"phi {found[0][0].type} {ways}")

    def ret(self, value: Value | None = None) -> None:
        self.line("ret void" if value is None else f"ret {value}")
