"""Files with recorded routing: tokens with their experts, or how many tokens chose each expert, layer by layer.

| file | what is in it |
| --- | --- |
| .npz | topk_idx, topk_weights, num_tokens, num_experts, as Routing.save writes them; or a count table named counts |
| .jsonl | one object a line: topk_experts, and if known topk_weights, pe (or rank), layer |
| .npy, .json, .csv, .pt | a count table: (num_layers, num_experts) or (num_experts,) |
| .csv | or lines of layer_id,expert_id,count under that header; experts that are not there have none |
| .pt | or the tokens that SGLang's recorder writes in its mode per_token |

JSON objects and .pt files hold their count table under logical_count (SGLang; one table a recorded step, which are
added up) or counts (LMDeploy). Layers without any count are dense ones and left out.
Source: expert_distribution.py and expert_location.py in SGLang's srt/eplb; LMDeploy's experts_distribution_recorder.py
(.json, later .pt) and its pytorch/nn/eplb.py.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.counts import check_counts

if TYPE_CHECKING:
    from flashmoe.routing import Routing

SUFFIXES = (".npz", ".jsonl", ".json", ".csv", ".npy", ".pt")
_COUNT_KEYS = ("logical_count", "counts")
_NPZ_KEYS = ("topk_idx", "topk_weights", "num_tokens", "num_experts")
_CSV_HEADER = ["layer_id", "expert_id", "count"]


@dataclass(frozen=True)
class Tokens:
    """What the tokens of one layer chose.

    topk_idx: (num_tokens, top_k) integers, the PEs' tokens one after the other. topk_weights: of the same shape.
    num_tokens: of each PE, None when the file does not say which PE a token belongs to.
    all_pes: whether num_tokens has all PEs; else PEs without tokens may be missing at its end.
    num_experts, name: None when the file does not say.
    """

    topk_idx: NDArray[Any]
    topk_weights: NDArray[Any]
    num_tokens: tuple[int, ...] | None = None
    all_pes: bool = False
    num_experts: int | None = None
    name: str | None = None


Recorded = dict[int, Tokens | NDArray[Any]]  # layer -> its tokens, or its (num_experts,) counts


def read(path: str | PathLike[str], num_experts: int) -> Recorded:
    """Return what a file holds for each of its layers, in ascending order. num_experts: the model's.

    Raises: ValueError naming the file, where it is text the line, and the value that does not fit.
    """
    readers = {
        ".npz": _read_npz,
        ".npy": _read_npy,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".pt": _read_pt,
    }
    with _errors_name(path):
        recorded = readers[Path(path).suffix](Path(path), num_experts)
        for layer, counts in recorded.items():
            if isinstance(counts, np.ndarray) and len(counts) != num_experts:
                raise ValueError(f"layer {layer} has counts of {len(counts)} experts (the model has {num_experts})")
        return recorded


def read_saved(path: str | PathLike[str]) -> list[Tokens]:
    """Return the layers of an .npz with tokens, whatever the model; errors as in `read`."""
    with _errors_name(path):
        layers = [held for held in _read_npz(Path(path), 0).values() if isinstance(held, Tokens)]
        if not layers:
            raise ValueError("it holds counts: Routing.parse expands them to tokens")
        return layers


def write(path: str | PathLike[str], layers: Sequence[Routing]) -> None:
    """Write an .npz; with more than one layer topk_idx and topk_weights get a first axis for them."""
    first = layers[0]
    same = ("num_tokens", "top_k", "num_experts")
    for field in same:
        if len({getattr(layer, field) for layer in layers}) > 1:
            raise ValueError(f"{field}={[getattr(layer, field) for layer in layers]} (must be the same in all layers)")
    idx, weights = (
        np.stack([np.concatenate(getattr(layer, field)) for layer in layers]) for field in ("topk_idx", "topk_weights")
    )
    with open(path, "wb") as file:  # a name would get .npz appended
        np.savez_compressed(
            file,
            topk_idx=idx if len(layers) > 1 else idx[0],
            topk_weights=weights if len(layers) > 1 else weights[0],
            num_tokens=np.array(first.num_tokens, dtype=np.int64),
            num_experts=np.int64(first.num_experts),
            name=np.array(first.name),
        )


@contextmanager
def _errors_name(path: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read a routing from {path} ({error})") from error


# ---- numpy


def _read_npz(path: Path, num_experts: int) -> Recorded:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):  # numpy would take it for a pickle
            raise ValueError("not an npz file")
        with np.load(file) as arrays:
            for key in _COUNT_KEYS:
                if key in arrays:
                    return _count_table(arrays[key])
            missing = [key for key in _NPZ_KEYS if key not in arrays]
            if missing:
                wanted = f"needs {', '.join(_NPZ_KEYS)}; or {' or '.join(_COUNT_KEYS)}"
                raise ValueError(f"no {', '.join(missing)}; {wanted}")
            idx, weights, num_tokens, experts = (arrays[key] for key in _NPZ_KEYS)
            name = str(arrays["name"]) if "name" in arrays else None
    if idx.ndim == 2:
        idx, weights = idx[None], weights[None]
    if idx.ndim != 3 or weights.shape != idx.shape:
        raise ValueError(f"topk_idx is {idx.shape} and topk_weights {weights.shape} (must be the same, 2- or 3-d)")
    if num_tokens.ndim != 1 or num_tokens.sum() != idx.shape[1]:
        raise ValueError(f"num_tokens={num_tokens.tolist()} does not add up to the {idx.shape[1]} rows of topk_idx")
    counts = tuple(num_tokens.tolist())
    return {layer: Tokens(idx[layer], weights[layer], counts, True, int(experts), name) for layer in range(len(idx))}


def _read_npy(path: Path, num_experts: int) -> Recorded:
    return _count_table(np.load(path, allow_pickle=False))


# ---- text


def _read_jsonl(path: Path, num_experts: int) -> Recorded:
    rows = list(_json_lines(path, num_experts))
    if not rows:
        raise ValueError("it is empty")
    for field in ("topk_weights", "pe", "layer"):
        without = [row["line"] for row in rows if row[field] is None]
        if 0 < len(without) < len(rows):
            raise ValueError(f"line {without[0]}: no {field}, which other lines have (must be in all or none)")
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"] or 0, []).append(row)
    layers: Recorded = {}
    for layer, tokens in sorted(by_layer.items()):
        num_tokens = None
        if tokens[0]["pe"] is not None:
            tokens.sort(key=lambda row: row["pe"])  # stable: a PE's tokens stay in order
            num_tokens = tuple(np.bincount([row["pe"] for row in tokens]).tolist())
        idx = np.array([row["topk_experts"] for row in tokens])
        given = tokens[0]["topk_weights"] is not None
        weights = np.array([row["topk_weights"] for row in tokens]) if given else equal_weights(idx)
        layers[layer] = Tokens(idx, weights, num_tokens)
    return layers


def _json_lines(path: Path, num_experts: int) -> Iterator[dict[str, Any]]:
    """One checked dict a line: line, topk_experts, and topk_weights, pe and layer or None."""
    top_k = None
    with open(path, encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                token = json.loads(text)
            except ValueError as error:
                raise ValueError(f"line {line}: {error}") from None
            if not isinstance(token, dict) or "topk_experts" not in token:
                raise ValueError(f"line {line}: {text.strip()[:60]} (must be an object with topk_experts)")
            experts, weights = token["topk_experts"], token.get("topk_weights")
            if not _are_experts(experts, num_experts):
                raise ValueError(
                    f"line {line}: topk_experts={experts} (must be a list of distinct experts in "
                    f"0..{num_experts - 1}; -1 for a dropped slot)"
                )
            top_k = top_k or len(experts)
            if len(experts) != top_k:
                raise ValueError(f"line {line}: topk_experts={experts} (lines before have {top_k} experts)")
            if weights is not None and not (_numbers(weights) and len(weights) == top_k):
                raise ValueError(f"line {line}: topk_weights={weights} (must be {top_k} numbers, one an expert)")
            if "pe" in token and "rank" in token:
                raise ValueError(f"line {line}: pe and rank are both given (accepted: one of them)")
            pe, layer = token.get("pe", token.get("rank")), token.get("layer")
            for field, value in (("pe", pe), ("layer", layer)):
                if value is not None and not (_whole(value) and value >= 0):
                    raise ValueError(f"line {line}: {field}={value!r} (must be an integer of at least 0)")
            yield {"line": line, "topk_experts": experts, "topk_weights": weights, "pe": pe, "layer": layer}


def _read_json(path: Path, num_experts: int) -> Recorded:
    with open(path, encoding="utf-8") as file:
        return _counts_in(json.load(file))


def _read_csv(path: Path, num_experts: int) -> Recorded:
    with open(path, newline="", encoding="utf-8") as file:
        lines = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    if not lines:
        raise ValueError("it is empty")
    listed = [cell.strip() for cell in lines[0][1]] == _CSV_HEADER
    columns: tuple[Callable[[str], float], ...] = (int, int, float) if listed else (float,) * len(lines[0][1])
    rows = []
    for line, row in lines[1:] if listed else lines:
        try:
            rows.append([number(cell) for number, cell in zip(columns, row, strict=True)])
        except ValueError:
            wanted = ",".join(_CSV_HEADER) if listed else f"{len(columns)} counts, one an expert"
            hint = "" if listed else f"; or lines under the header {','.join(_CSV_HEADER)}"
            raise ValueError(f"line {line}: {','.join(row)[:60]} (must be {wanted}{hint})") from None
        if listed and not (rows[-1][0] >= 0 and 0 <= rows[-1][1] < num_experts):
            raise ValueError(f"line {line}: {','.join(row)} (expert must be in 0..{num_experts - 1}, layer at least 0)")
    if not rows or not listed:
        return _count_table(np.array(rows))
    layer, expert = np.array(rows)[:, :2].astype(int).T
    table = np.zeros((layer.max() + 1, num_experts))
    np.add.at(table, (layer, expert), np.array(rows)[:, 2])  # the files of several ranks may be joined
    return _count_table(table)


# ---- torch


def _read_pt(path: Path, num_experts: int) -> Recorded:
    try:
        import torch
    except ImportError as error:
        raise ValueError("a .pt file needs torch: pip install 'flashmoe[torch]'") from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of another kind makes torch's unpickler raise anything
        raise ValueError(f"torch cannot read it: {error!r:.200}") from error
    if isinstance(held, dict) and "records" in held:
        return _sglang_records(held, num_experts)
    return _counts_in(held)


def _sglang_records(held: dict[str, Any], num_experts: int) -> Recorded:
    """The recorder's modes per_token and per_pass. One file is one rank's, so no token has a PE."""
    wanted = "last_physical_to_logical_map"
    if wanted not in held or not held["records"]:
        raise ValueError(f"records without {wanted}, or none at all")
    logical = np.asarray(held[wanted])  # (num_layers, num_physical_experts)
    fields = [record.keys() for record in held["records"]]
    if all("topk_ids_of_layer" in keys for keys in fields):
        physical = np.concatenate([np.asarray(record["topk_ids_of_layer"]) for record in held["records"]], axis=1)
        layers: Recorded = {}
        for layer, ids in enumerate(physical):
            ids = ids[:, (ids >= 0).any(axis=0)]  # the recorder has 8 columns, whatever the model
            if ids.size:
                idx = np.where(ids >= 0, logical[layer][ids], -1)
                layers[layer] = Tokens(idx, equal_weights(idx))
        return layers
    if not all("global_physical_count" in keys for keys in fields):
        raise ValueError("records have neither topk_ids_of_layer nor global_physical_count")
    physical = np.sum([np.asarray(record["global_physical_count"]) for record in held["records"]], axis=0)
    table = np.zeros((len(logical), num_experts), dtype=np.int64)
    np.add.at(table, (np.arange(len(logical))[:, None], logical), physical)  # copies of an expert together
    return _count_table(table)


# ---- what the readers share


def _counts_in(held: Any) -> Recorded:
    if isinstance(held, dict):
        found = [key for key in _COUNT_KEYS if key in held]
        if not found:
            raise ValueError(f"it has {', '.join(map(str, held)) or 'nothing'} (must have {' or '.join(_COUNT_KEYS)})")
        held = held[found[0]]
    return _count_table(np.asarray(held))


def _count_table(table: NDArray[Any]) -> Recorded:
    if table.ndim == 3:
        table = table.sum(axis=0)
    if table.dtype.kind not in "iuf" or table.ndim not in (1, 2) or not table.size:
        raise ValueError(f"counts are {table.dtype} {table.shape} (must be numbers (num_layers, num_experts))")
    table = np.atleast_2d(table)
    check_counts(table)
    if not table.any():
        raise ValueError("all counts are 0")
    return {layer: row for layer, row in enumerate(table) if row.any()}


def equal_weights(idx: NDArray[Any]) -> NDArray[np.float32]:
    """Weights where none are known: 1 / top_k in each slot of idx (num_tokens, top_k)."""
    return np.full(idx.shape, 1 / idx.shape[1], dtype=np.float32)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_experts(experts: Any, num_experts: int) -> bool:
    if not isinstance(experts, list) or not experts or not all(_whole(expert) for expert in experts):
        return False
    used = [expert for expert in experts if expert != -1]
    return len(set(used)) == len(used) and all(0 <= expert < num_experts for expert in used)
