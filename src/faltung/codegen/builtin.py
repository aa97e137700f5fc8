"""Machine code as built-in functions of Python: ``METH_FASTCALL``, the calling convention of the interpreter's own.

A call through ctypes takes 0.6 us for six arguments, a tiny layer's kernel 0.7: the wrappers here take 0.14.  They are generated too, and use the stable
ABI alone.  The interpreter's lock is released while the kernel runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .compile import compile_object
from .place import place

if TYPE_CHECKING:
    from ..cpu.target import Target

__all__ = ["STACK_BYTES", "builtin", "builtin_on_stack"]

STACK_BYTES = 32 << 10
"""The largest workspace that a call takes from its thread's stack."""
_ALIGNMENT = 4096
_METH_FASTCALL = 0x80
_API = ("PyLong_AsVoidPtr", "PyErr_Occurred", "PyErr_SetString", "PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef")
_MESSAGE = b"a kernel takes addresses and whole numbers, as many as its operands"


class _MethodDefinition(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("method", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


def builtin(entry: int, arguments: int, owner: object, target: Target) -> Callable[..., None]:
    """``entry(a, b, ...)`` of so many addresses or 64-bit integers; ``owner``, which keeps the code in memory, lives as long as the function."""
    return _made(_wrapper(arguments, 0, target), (entry,), owner)


def builtin_on_stack(entry: int, arguments: int, block: int, workspace_bytes: int, owner: object, target: Target) -> Callable[..., None]:
    """``entry(block, a, b, ..., workspace)``, the workspace aligned to pages, of at most ``STACK_BYTES`` on the stack of the calling thread.

    Raises ValueError for a larger one.
    """
    if workspace_bytes > STACK_BYTES:
        raise ValueError(f"{workspace_bytes} bytes are too many for a stack")
    return _made(_wrapper(arguments, STACK_BYTES, target), (entry, block), owner)


def _made(wrapper: tuple[_MethodDefinition, Any], values: tuple[int, ...], owner: object) -> Callable[..., None]:
    definition, engine = wrapper
    constants = np.array(values, np.int64)
    # the last argument is what __module__ shows; the function holds it, and with it everything that a call reads
    function: Callable[..., None] = _new()(ctypes.addressof(definition), constants.ctypes.data, (owner, constants, definition, engine))
    return function


@lru_cache(maxsize=1)
def _new() -> Any:
    new = ctypes.pythonapi.PyCFunction_NewEx
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.py_object)
    return prototype(ctypes.cast(new, ctypes.c_void_p).value or 0)


@lru_cache(maxsize=16)
def _wrapper(arguments: int, stack_bytes: int, target: Target) -> tuple[_MethodDefinition, Any]:
    engine = place([compile_object(_text(arguments, stack_bytes), target)])
    addresses = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0 for name in _API]
    error = ctypes.c_void_p.in_dll(ctypes.pythonapi, "PyExc_TypeError").value or 0
    table = np.array([*addresses, error, id(None)], np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("initialize"))(table.ctypes.data)
    return _MethodDefinition(b"kernel", engine.get_function_address("call"), _METH_FASTCALL, None), engine


def _text(arguments: int, stack_bytes: int) -> str:
    """A wrapper's module: ``initialize`` stores the addresses of the interpreter's functions, ``call`` is what the interpreter calls."""
    count = len(_API) + 2
    api = "\n".join(
        f"  %{name}.at = getelementptr ptr, ptr @api, i64 {i}\n  %{name} = load ptr, ptr %{name}.at" for i, name in enumerate((*_API, "TypeError", "None"))
    )
    read = "\n".join(
        f"  %arg{i}.at = getelementptr ptr, ptr %args, i64 {i}\n  %arg{i}.object = load ptr, ptr %arg{i}.at\n"
        f"  %arg{i} = call ptr %PyLong_AsVoidPtr(ptr %arg{i}.object)"
        for i in range(arguments)
    )
    operands = [f"ptr %arg{i}" for i in range(arguments)]
    prepared = ""
    if stack_bytes:
        operands = ["ptr %block", *operands, "ptr %workspace"]
        prepared = f"""
  %block.at = getelementptr ptr, ptr %constants, i64 1
  %block = load ptr, ptr %block.at
  %raw = alloca i8, i64 {stack_bytes + _ALIGNMENT}, align 64
  %raw.address = ptrtoint ptr %raw to i64
  %beyond = add i64 %raw.address, {_ALIGNMENT - 1}
  %aligned = and i64 %beyond, {-_ALIGNMENT}
  %workspace = inttoptr i64 %aligned to ptr"""
    message = "".join(f"\\{byte:02X}" for byte in (*_MESSAGE, 0))
    return f"""
@api = internal global [{count} x ptr] zeroinitializer
@message = internal constant [{len(_MESSAGE) + 1} x i8] c"{message}"

define void @initialize(ptr %table) {{
  %values = load [{count} x ptr], ptr %table
  store [{count} x ptr] %values, ptr @api
  ret void
}}

define ptr @call(ptr %self, ptr %args, i64 %given) {{
{api}
  %counted = icmp eq i64 %given, {arguments}
  br i1 %counted, label %convert, label %refuse
refuse:
  call void %PyErr_SetString(ptr %TypeError, ptr @message)
  ret ptr null
convert:
  %constants = call ptr %PyLong_AsVoidPtr(ptr %self)
{read}
  %error = call ptr %PyErr_Occurred()
  %good = icmp eq ptr %error, null
  br i1 %good, label %run, label %failed
failed:
  ret ptr null
run:
  %entry = load ptr, ptr %constants{prepared}
  %thread = call ptr %PyEval_SaveThread()
  call void %entry({", ".join(operands)})
  call void %PyEval_RestoreThread(ptr %thread)
  call void %Py_IncRef(ptr %None)
  ret ptr %None
}}
"""
