"""Tests with the mark of a card are skipped, with the reason, where that card or its compiler is missing."""

import functools
import shutil

import pytest


@functools.cache
def missing(mark):
    """What a test with this mark lacks here; None: nothing."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None  # AMD's cards, too
    if mark == "cuda":
        if card is None or torch.version.cuda is None or (card.major, card.minor) != (9, 0):
            return "needs an H100 or H200, and a torch that can use it"
        return None if shutil.which("nvcc") else "needs nvcc in PATH"
    if card is None or not getattr(card, "gcnArchName", "").startswith("gfx942"):
        return "needs an MI300X, and a torch that can use it"
    return None if shutil.which("hipcc") or shutil.which("clang++-19") else "needs hipcc in PATH"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for mark in ("cuda", "mi300x"):
        if item.get_closest_marker(mark) and (reason := missing(mark)):
            pytest.skip(reason)
