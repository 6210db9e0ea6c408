"""Tensors on the card, of whatever library has torch's methods: checked, then used where they are."""

from __future__ import annotations

from typing import Any


def is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr")


def check_tensor(name: str, tensor: Any, shape: tuple[int | str, ...], dtype: str) -> None:
    """shape: a string stands for any size, and is its name in messages. dtype: as in "bfloat16".

    Raises: ValueError naming what does not fit.
    """
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} (must be ({', '.join(map(str, shape))}))")
    if str(tensor.dtype).removeprefix("torch.") != dtype:
        raise ValueError(f"{name} is {tensor.dtype} (must be torch.{dtype})")


def pointer_of(name: str, tensor: Any, shape: tuple[int | str, ...], dtype: str = "bfloat16") -> int:
    """The tensor's device pointer. Raises: ValueError naming what does not fit."""
    check_tensor(name, tensor, shape, dtype)
    if not tensor.is_cuda:  # True of AMD's cards, too
        raise ValueError(f"{name} is on {tensor.device} (must be on the card)")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()} (must be contiguous)")
    return int(tensor.data_ptr())


def current_stream(tensor: Any) -> int:
    """torch's current stream on the tensor's device, as the driver's handle."""
    import torch

    return int(torch.cuda.current_stream(tensor.device).cuda_stream)
