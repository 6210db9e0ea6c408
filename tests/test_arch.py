"""Packed weights: each lane finds its share of a 16 x 32 chunk where the matrix instruction of its target wants it."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "hip_src"
PROGRAM = r"""
#include <cstdio>
#include "{arch}.hpp"
using namespace flashmoe;
int main() {{
  for (u32 row = 0; row < 16; ++row)
    for (u32 k = 0; k < 32; ++k) std::printf("%u ", arch::place_in_chunk(row, k));
  std::puts("");
  for (u32 lane = 0; lane < arch::wave_size; ++lane) std::printf("%u %u ", arch::column_of(lane), arch::k_of(lane));
  std::puts("");
  for (u32 lane = 0; lane < arch::wave_size; ++lane)
    for (u32 i = 0; i < 4; ++i) std::printf("%u %u ", arch::sum_row(lane, i), arch::sum_column(lane, i));
}}
"""


def numbers(arch, folder):
    """Place of each (row, k); token and first k of each lane; (row, column) of each lane's sums."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here; any machine with a host compiler runs this")
    source, program = folder / "print.cpp", folder / "print"
    source.write_text(PROGRAM.format(arch=arch))
    include = [f"-I{SOURCE / 'include'}", f"-I{SOURCE / 'kernel' / 'arch'}"]
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", *include, source, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    place, lanes, sums = ([int(word) for word in line.split()] for line in said)
    places = {(row, k): place[row * 32 + k] for row in range(16) for k in range(32)}
    assert sorted(place) == list(range(512))
    return places, list(zip(lanes[::2], lanes[1::2], strict=True)), list(zip(sums[::2], sums[1::2], strict=True))


def test_sm90(tmp_path):
    """mma.m16n8k16 (PTX ISA, matrix fragments): a lane has rows g and g + 8 with g = lane / 4, and four k's of which it
    holds two in each of its registers, in the order (g, low), (g + 8, low), (g, high), (g + 8, high)."""
    places, lanes, sums = numbers("sm90", tmp_path)
    for lane in range(32):
        group, first_k = lane // 4, lane % 4 * 8
        assert lanes[lane] == (group, first_k)
        for half in range(2):
            k = first_k + 4 * half
            held = [(group, k), (group, k + 1), (group + 8, k), (group + 8, k + 1)]
            held += [(row, k + 2) for row, k in held]
            begin = (half * 32 + lane) * 8  # 16 bytes of the half
            assert [places[element] for element in held] == list(range(begin, begin + 8))
        pair = lane % 4 * 2
        assert sums[4 * lane : 4 * lane + 4] == [(row, pair + i) for row in (group, group + 8) for i in (0, 1)]


def test_gfx942(tmp_path):
    """v_mfma_f32_16x16x16_bf16 (CDNA3 ISA, matrix layouts): a lane has row lane % 16, and four k's a time; its sums
    are four rows of column lane % 16."""
    places, lanes, sums = numbers("gfx942", tmp_path)
    for lane in range(64):
        assert lanes[lane] == (lane % 16, lane // 16 * 8)
        held = [places[lane % 16, lane // 16 * 8 + i] for i in range(8)]
        assert held == list(range(lane * 8, lane * 8 + 8))
        assert sums[4 * lane : 4 * lane + 4] == [(lane // 16 * 4 + i, lane % 16) for i in range(4)]
