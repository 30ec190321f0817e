"""The kernels of AVX-VNNI: the encoding of their instructions, and the plain C that replaces these in tests."""

import ctypes
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from calmclip.models.ops import build
from calmclip.models.ops.library import Library
from tests.models.ops import emulated

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="an instruction set of x86-64")
# `name`(sum, x, w): one instruction on vectors in memory.
DOTS = """#include <immintrin.h>
#include <cstdint>
#include <cstring>
namespace {
#include "dot_avxvnni.inc"
}
#define EXPORT(name)                                                                                           \\
  extern "C" __attribute__((visibility("default"))) void call_##name(void* sum, const void* x, const void* w) { \\
    const auto load = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };         \\
    __m256i s = load(sum);                                                                                      \\
    name(s, load(x), load(w));                                                                                  \\
    _mm256_storeu_si256(static_cast<__m256i*>(sum), s);                                                         \\
  }
EXPORT(dot)
EXPORT(dot_words)
"""


def instructions(library: Path) -> list[tuple[str, str]]:
    """The encoding and text of each instruction of the files `*_avxvnni.cc`."""
    symbols = subprocess.run(["readelf", "-sW", library], capture_output=True, text=True, check=True).stdout
    file, ranges = "", []
    for line in symbols.splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0].rstrip(":").isdigit():
            continue
        value, size, kind, name = int(fields[1], 16), int(fields[2], 0), fields[3], fields[7]
        file = name if kind == "FILE" else file  # before the local symbols of that file
        if kind == "FUNC" and (file.endswith("_avxvnni.cc") or name.endswith("_avxvnni")):
            ranges.append(range(value, value + size))
    shown = subprocess.run(["objdump", "-d", "--wide", library], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^ *([0-9a-f]+):\t([0-9a-f ]+)\t(.*)$", shown, re.MULTILINE)
    starts = np.array([int(address, 16) for address, *_ in lines])
    inside = np.zeros(len(lines), bool)
    for part in ranges:
        inside |= (starts >= part.start) & (starts < part.stop)
    return [(lines[i][1].strip(), lines[i][2]) for i in np.flatnonzero(inside)]


def test_the_encoding_is_that_of_processors_without_avx512(library: Library):
    """The first byte of an instruction in EVEX is 62; in VEX it is c4 or c5."""
    shown = instructions(library.path)
    products = [code for code, text in shown if re.search(r"vpdp(busd|wssd)\b", text)]
    if "avxvnni" not in library.about["emulate"].split():
        kinds = {name: sum(name in text for _, text in shown) for name in ("vpdpbusd", "vpdpwssd")}
        assert kinds["vpdpbusd"] > 500
        assert kinds["vpdpwssd"] > 40
    assert all(code.startswith("c4 ") for code in products)
    assert not [
        text
        for code, text in shown
        if code.startswith("62 ") or re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", text)
    ]


def forms() -> dict[str, tuple[str, ...]]:
    """The forms of the instructions that run here -> their flags."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
    here = {"plain": build.EMULATED["avxvnni"]}
    if "avx512_vnni" in flags and "avx512vl" in flags:
        here["EVEX"] = emulated.EVEX
    if "avx_vnni" in flags:
        here["VEX"] = build.ISA_FLAGS["avxvnni"]
    return here


def test_every_form_of_the_products_equals_numpy(library: Library, tmp_path: Path):
    """Modulo 2^32, at the extremes, too."""
    (tmp_path / "dots.cc").write_text(DOTS)
    rng = np.random.default_rng(0)
    for form, flags in forms().items():
        emulated.link(tmp_path / f"{form}.so", [tmp_path / "dots.cc"], flags)
        dots = ctypes.CDLL(str(tmp_path / f"{form}.so"))
        for name, x_type, w_type, many in (("dot", np.uint8, np.int8, 4), ("dot_words", np.int16, np.int16, 2)):
            for extreme in (False, True) * 20:
                x, w = (
                    rng.choice([np.iinfo(dtype).min, np.iinfo(dtype).max], 8 * many).astype(dtype)
                    if extreme
                    else rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, 8 * many).astype(dtype)
                    for dtype in (x_type, w_type)
                )
                start = rng.choice([0, -(2**31), 2**31 - 1, 12345], 8).astype(np.int32)
                products = (x.astype(np.int64) * w).reshape(8, many).sum(1) + start
                y = start.copy()
                dots[f"call_{name}"](*(ctypes.c_void_p(array.ctypes.data) for array in (y, x, w)))
                assert (y == (products & 0xFFFFFFFF).astype(np.uint32).view(np.int32)).all(), (form, name)
