"""What glibc does with freed memory, seen from a process of its own."""

import platform
import subprocess
import sys

import pytest

from instruct_lm.fast import allocator

# Allocates and frees, as a training step does; prints what the process holds after each call of the module.
SCRIPT = """
import ctypes, runpy
from pathlib import Path
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def held():
    # 40 MB each: up to 32 MB, glibc itself stops to map blocks once one was freed.
    blocks = [libc.malloc(40 * 2**20) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, 40 * 2**20)
    for block in blocks:
        libc.free(block)
    return resident()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

module = runpy.run_path(PATH)
before = held()
module["keep_freed_memory"]()
kept = held()
module["give_back_freed_memory"]()
print(before, kept, resident())
""".replace("PATH", repr(allocator.__file__))


@pytest.mark.skipif(not allocator._is_glibc(), reason="glibc's own settings")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())  # MB
    assert kept - before > 70
    assert kept - after > 70


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("glibc is asked"))
    allocator.keep_freed_memory()
    allocator.give_back_freed_memory()
