"""A team's phases: each share once, all of them done before the next, and nobody waited for who has
not begun."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import prefixd_server.native

FOLDER = Path(prefixd_server.native.__file__).parent

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "team.h"

constexpr int THREADS = 3, PHASES = 600, ITEMS = 7;
std::atomic<int> runs[PHASES][ITEMS];

void run(int phase, int64_t share) {
    for (int i = (phase * 7919 + int(share) * 104729) % 5000; i > 0; i--) asm volatile("");
    runs[phase][share]++;
}

int main() {
    std::vector<prefixd::Phase> phases(PHASES);
    std::atomic<int> at_end{0}, wrong{0};
#pragma omp parallel num_threads(THREADS)
    {
        prefixd::Member member(phases);
        if (member.threads != THREADS) wrong++;
        for (int phase = 0; phase < PHASES; phase++) {
            // One thread is away until the others have done everything.
            if (AWAY && phase == 100 && member.thread == 1)
                while (at_end < THREADS - 1) sched_yield();
            if (phase % 7 == 0) member.offer_core();
            const int shares = phase % 2 ? ITEMS : THREADS;
            if (phase % 2) member.items(ITEMS, [&](int64_t item) { run(phase, item); });
            else member.shares([&](int share, int) { run(phase, share); });
            for (int i = 0; i < shares; i++) wrong += runs[phase][i] != 1;
        }
        at_end++;
    }
    std::printf("%d wrong\\n", wrong.load());
}
"""


@pytest.mark.parametrize("away", [0, 1])
def test_phases(tmp_path: Path, away: int) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, program = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(PROGRAM)
    flags = ["-O2", "-std=c++17", "-fopenmp", f"-DAWAY={away}", f"-I{FOLDER}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    for _ in range(5):
        ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=True)
        assert ran.stdout == "0 wrong\n"
