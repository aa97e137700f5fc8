"""The cache of compiled kernels on disk: what is found, what is a miss, who may read it, and how large it grows."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from emitted import module_text
from faltung import config
from faltung.codegen import compile as compiler
from faltung.codegen.compile import cache_folder, cache_size, compile_object, statistics
from faltung.cpu import target

MACHINE = target.TARGETS[target.runnable_targets()[0]]
root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs to give files to another user")


def without_privileges(call: Callable[[], None]) -> None:
    """``call`` in a thread that has given up what root may do beyond permissions; in Linux these capabilities belong to a thread."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            if hasattr(os, "getuid") and os.getuid() == 0:
                header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
                if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
                    raise OSError(ctypes.get_errno(), "capset")
            call()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def text_of(number: int) -> str:
    return module_text(["pout"], lambda f: f.store(f.value(number), f["pout"]))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty cache, with counters at zero."""
    with config.override(cache_dir=str(tmp_path / "kernels")):
        compiler._usable.cache_clear()
        statistics.hits = statistics.misses = statistics.corrupt = 0
        yield tmp_path / "kernels"
    compiler._usable.cache_clear()


def counts() -> tuple[int, int, int]:
    return statistics.hits, statistics.misses, statistics.corrupt


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("*.kernel")
    return found


def test_miss_then_hit_with_the_same_bytes(folder: Path) -> None:
    first = compile_object(text_of(1), MACHINE)
    assert counts() == (0, 1, 0)
    assert compile_object(text_of(1), MACHINE) == first
    assert counts() == (1, 1, 0)
    assert first.startswith(b"\x7fELF")
    assert cache_size() == the_file(folder).stat().st_size > len(first)


def test_another_text_or_target_is_another_object(folder: Path) -> None:
    compile_object(text_of(1), MACHINE)
    compile_object(text_of(2), MACHINE)
    compile_object(text_of(1), replace(MACHINE, features=MACHINE.features + ",-bmi2" if MACHINE.features else "-bmi2"))
    compile_object(text_of(1), replace(MACHINE, cpu="x86-64-v3"))
    assert counts() == (0, 4, 0)
    assert len(list(folder.glob("*.kernel"))) == 4


@pytest.mark.parametrize("field", ("llvm", "llvmlite"))
def test_another_version_is_a_miss(folder: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_object(text_of(1), MACHINE)
    if field == "llvm":
        monkeypatch.setattr(compiler.llvm, "llvm_version_info", (99, 0, 0))
    else:
        monkeypatch.setattr(compiler.llvmlite, "__version__", "99.0")
    compile_object(text_of(1), MACHINE)
    assert counts() == (0, 2, 0)


@pytest.mark.parametrize("damage", ("flip", "truncate", "empty", "header", "longer", "foreign"))
def test_a_damaged_file_is_a_miss_and_is_mended(folder: Path, damage: str) -> None:
    good = compile_object(text_of(1), MACHINE)
    path = the_file(folder)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "truncate": content[:middle],
            "empty": b"",
            "header": content[:40],
            "longer": content + b"\0",
            "foreign": b"\x7fELF" + content,
        }[damage]
    )
    assert compile_object(text_of(1), MACHINE) == good
    assert statistics.misses == 2
    assert statistics.corrupt >= 1
    assert path.read_bytes() == content
    assert compile_object(text_of(1), MACHINE) == good
    assert statistics.misses == 2


def test_the_folder_is_private(folder: Path) -> None:
    compile_object(text_of(1), MACHINE)
    assert folder.stat().st_mode & 0o077 == 0
    assert the_file(folder).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775], ids=oct)
def test_a_folder_that_others_may_write_to_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(mode)
    with config.override(cache_dir=str(open_folder)):
        ours = cache_folder()
    assert open_folder.stat().st_mode & 0o7777 == mode
    assert ours is not None
    assert ours.parent == open_folder
    assert ours.stat().st_mode & 0o777 == 0o700


def test_a_link_that_others_may_have_put_there_is_not_followed(tmp_path: Path) -> None:
    open_folder, elsewhere = tmp_path / "open", tmp_path / "elsewhere"
    open_folder.mkdir()
    open_folder.chmod(0o1777)
    elsewhere.mkdir(mode=0o700)
    (open_folder / f"faltung-{os.getuid()}").symlink_to(elsewhere)
    with config.override(cache_dir=str(open_folder)):
        assert cache_folder() is None


@root
def test_a_file_of_another_owner_is_a_miss(folder: Path) -> None:
    good = compile_object(text_of(1), MACHINE)
    os.chown(the_file(folder), 12345, -1)
    assert compile_object(text_of(1), MACHINE) == good
    assert statistics.misses == 2
    assert the_file(folder).stat().st_uid == os.getuid()


@root
def test_a_folder_of_another_owner_is_not_used(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.chown(foreign, 12345, -1)
    with config.override(cache_dir=str(foreign)):
        assert cache_folder() is None
        assert compile_object(text_of(1), MACHINE).startswith(b"\x7fELF")
    assert not list(foreign.iterdir())


def test_no_cache_on_disk_where_the_folder_is_an_empty_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with config.override(cache_dir=""):
        assert cache_folder() is None
        assert cache_size() == 0
        before = statistics.misses
        assert compile_object(text_of(1), MACHINE) == compile_object(text_of(1), MACHINE)
        assert statistics.misses == before + 2
    assert not list(tmp_path.iterdir())


def test_a_folder_without_permission_works_without_a_cache(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)

    def call() -> None:
        with config.override(cache_dir=str(closed / "kernels")):
            assert cache_folder() is None
            assert compile_object(text_of(1), MACHINE).startswith(b"\x7fELF")

    without_privileges(call)
    assert not list(closed.iterdir())


def test_large_folders_are_looked_through_at_some_writes_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(compiler, "_ENTRIES_A_WRITE", 4)
    monkeypatch.setattr(compiler, "_entries", lambda path, real=compiler._entries: looks.append(path) or real(path))
    with config.override(cache_limit_mb=1):
        compile_object(text_of(0), MACHINE)
        size = the_file(folder).stat().st_size
        for number in range(1, 16):
            filler = folder / (f"{number:064}" + ".kernel")
            filler.write_bytes(b"x" * ((1 << 20) // 15))
            os.utime(filler, (number, number))
        looks.clear()
        for number in range(1, 61):
            compile_object(text_of(number), MACHINE)
    assert 5 <= len(looks) <= 12
    assert sum(path.stat().st_size for path in folder.glob("*.kernel")) <= (1 << 20) + 20 * size


@pytest.mark.parametrize("place", ("/proc/nowhere/kernels", "/dev/null/kernels", "{file}/kernels"))
def test_an_impossible_folder_works_without_a_cache(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with config.override(cache_dir=place.format(file=tmp_path / "file")):
        compiler._usable.cache_clear()
        assert cache_folder() is None
        assert compile_object(text_of(1), MACHINE).startswith(b"\x7fELF")


def test_a_folder_that_vanishes_costs_a_compilation(folder: Path) -> None:
    good = compile_object(text_of(1), MACHINE)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert compile_object(text_of(1), MACHINE) == good


def test_the_oldest_objects_go_when_the_bound_is_reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with config.override(cache_limit_mb=1):
        compile_object(text_of(0), MACHINE)
        size = the_file(folder).stat().st_size
        filler = folder / ("0" * 64 + ".kernel")
        filler.write_bytes(b"x" * ((1 << 20) - 2 * size))
        os.utime(filler, (1, 1))
        used_long_ago = the_file_of(folder, 0)
        os.utime(used_long_ago, (2, 2))
        compile_object(text_of(1), MACHINE)
        assert filler.exists()  # just within the bound
        compile_object(text_of(2), MACHINE)
        assert not filler.exists()
        assert used_long_ago.exists()
        assert cache_size() <= 1 << 20


def the_file_of(folder: Path, number: int) -> Path:
    return folder / (compiler.object_key(text_of(number), MACHINE) + ".kernel")


def test_a_hit_counts_as_use(folder: Path) -> None:
    compile_object(text_of(0), MACHINE)
    path = the_file(folder)
    os.utime(path, (1, 1))
    compile_object(text_of(0), MACHINE)
    assert path.stat().st_mtime > 1e9


CHILD = """
import sys, time
from pathlib import Path
from test_cache import MACHINE, text_of
from faltung.codegen.compile import compile_object, statistics
while not Path(sys.argv[1]).exists():
    time.sleep(0.001)
lengths = [len(compile_object(text_of(i), MACHINE)) for i in range(40)]
print(statistics.hits, statistics.misses, statistics.corrupt, sum(lengths))
"""


def _child(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    known = {name: value for name, value in os.environ.items() if not name.startswith(("FALTUNG_", "XDG_"))}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env={**known, "PYTHONPATH": paths, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_at_once_compile_each_kernel_once(tmp_path: Path) -> None:
    start = tmp_path / "start"
    children = [_child(CHILD, str(start), FALTUNG_CACHE_DIR=str(tmp_path / "kernels")) for _ in range(2)]
    start.write_text("")
    results = []
    for child in children:
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0, err
        results.append([int(x) for x in out.split()])
    (hits0, misses0, corrupt0, length0), (hits1, misses1, corrupt1, length1) = results
    assert hits0 + misses0 == hits1 + misses1 == 40
    assert misses0 + misses1 == 40
    assert corrupt0 == corrupt1 == 0
    assert length0 == length1
    assert not list((tmp_path / "kernels").glob("*.tmp"))


@pytest.mark.parametrize("home", ("{missing}", "/proc/1/nowhere", ""))
def test_no_home_no_cache_no_error(tmp_path: Path, home: str) -> None:
    code = (
        "from test_cache import MACHINE, text_of\n"
        "from faltung.codegen.compile import compile_object, cache_folder\n"
        "print(len(compile_object(text_of(1), MACHINE)) > 0)\n"
    )
    child = _child(code, HOME=home.format(missing=tmp_path / "missing"))
    out, err = child.communicate(timeout=100)
    assert (child.returncode, out) == (0, "True\n"), err
