"""Report documents as the library's `to_json` gives them, small enough to check by hand."""

from __future__ import annotations

from typing import Any


def tensor(name: str, role: str, codec: str, before: int, after: int, error: float | None) -> dict[str, Any]:
    measured = None if error is None else {"rms": error / 10, "relative_rms": error, "max_abs": error * 3}
    return {
        "name": name, "role": role, "param": None, "shape": [before // 4], "dtype": "float32", "codec": codec,
        "bytes_before": before, "bytes_after": after, "error": measured,
    }  # fmt: skip


UPDATE = {"param": "w.0", "numel": 4, "u_rms": 0.0091, "max_u": 1.25, "max_u_exact": 1.03, "cosine": 0.99996}


def report() -> dict[str, Any]:
    return {
        "path": "ckpt.sc.safetensors", "format_version": [1, 0], "preset": "resume", "bytes": 4_000_000,
        "source": {"layout": "torch_zip", "bytes": 12_000_000, "sha256": "ab" * 32, "name": "ckpt.pt"},
        "seconds": 2.0, "ratio": 3.0, "bytes_per_param": 4.0, "num_params": 1_000_000, "notes": ["something to know"],
        "total": {"u_rms": 0.0091, "max_u": 1.25, "max_u_exact": 1.03, "cosine": 0.99996},
        "updates": [UPDATE],
        "tensors": [
            tensor("model.w.0", "weight", "split", 3_000_000, 1_500_000, 1e-6),
            tensor("model.w.1", "weight", "split", 1_000_000, 500_000, 2e-6),
            tensor("model.b", "weight", "raw", 400, 400, 0.0),
            tensor("opt.m.0", "exp_avg", "companded", 4_000_000, 1_000_000, 7e-3),
            tensor("opt.v.0", "exp_avg_sq", "companded(curve=log)", 4_000_000, 1_000_000, 9e-3),
            tensor("opt.step", "step", "raw", 4, 4, None),
        ],
    }  # fmt: skip


def plain() -> dict[str, Any]:
    """`inspect` of a checkpoint that is not compressed."""
    document = report() | {"path": "ckpt.pt", "format_version": None, "preset": None, "bytes": 12_000_000, "ratio": 1.0}
    document |= {"total": None, "updates": [], "notes": []}
    for entry in document["tensors"]:
        entry |= {"codec": "raw", "bytes_after": entry["bytes_before"], "error": None}
    return document


def compared(name: str, role: str, dtype: str) -> dict[str, Any]:
    """One tensor of a difference, equal on both sides."""
    return {
        "name": name, "role": role, "shape": [65536], "dtype": dtype, "rms": 0.0, "relative_rms": 0.0, "max_abs": 0.0,
        "mismatched": 0, "differing": 0, "identical": True,
    }  # fmt: skip


def difference() -> dict[str, Any]:
    base = report()
    tensors = [
        {key: t[key] for key in ("name", "role", "shape", "dtype")}
        | (t["error"] or {"rms": 0.0, "relative_rms": 0.0, "max_abs": 0.0})
        | {"mismatched": 0, "differing": 0, "identical": not t["error"]}
        for t in base["tensors"]
    ]
    return {
        "a": "a.pt", "b": "b.pt", "tensors": tensors, "updates": base["updates"], "total": base["total"],
        "only_in_a": [], "only_in_b": ["extra"], "not_comparable": [], "rest_differs": [],
        "notes": [], "identical": False, "tensors_equal": False,
    }  # fmt: skip
