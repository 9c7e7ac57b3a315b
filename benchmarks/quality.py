"""What each preset costs and keeps, on a trained GPT's fp32 AdamW checkpoint and on a bf16 weights file, beside ZipNN.

python benchmarks/quality.py        -> benchmarks/results/quality.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import CACHE, record, trained
from safetensors.torch import save_file
from zipnn import ZipNN

import statecodec


def main() -> None:
    """Measure and record."""
    checkpoint = trained()
    output = CACHE / "quality.sc.safetensors"
    presets = {
        name: preset(checkpoint, output, name) for name in ("lossless", "resume", "small", "tiny", "live", "weights")
    }
    weights = bf16_weights(checkpoint)
    report = statecodec.compress(weights, output, preset="lossless", force=True)
    record(
        "quality",
        {
            "checkpoint": {"bytes": checkpoint.stat().st_size, "params": report.num_params},
            "presets": presets,
            "zipnn_fp32_checkpoint": zipnn_ratio(checkpoint, "float32"),
            "bf16_weights": {
                "bytes": weights.stat().st_size,
                "lossless": report.ratio,
                "zipnn": zipnn_ratio(weights, "bfloat16"),
            },
        },
    )


def preset(checkpoint: Path, output: Path, name: str) -> dict[str, Any]:
    """Size and errors of one preset."""
    report = statecodec.compress(checkpoint, output, preset=name, force=True)
    total = statecodec.diff(checkpoint, output).total
    keys = ("weight_relative_rms", "weight_step_error", "u_rms", "max_u", "max_u_exact", "cosine")
    return {"ratio": report.ratio, "bytes_per_param": report.bytes_per_param, **{k: total[k] for k in keys}}


def zipnn_ratio(path: Path, dtype: str) -> float:
    """ZipNN on the same bytes, less a tail that is no multiple of four: ZipNN 0.5.4 corrupts its heap on such input."""
    data = path.read_bytes()
    data = data[: len(data) // 4 * 4]
    return len(data) / len(ZipNN(input_format="byte", bytearray_dtype=dtype).compress(data))


def bf16_weights(checkpoint: Path) -> Path:
    """The same model as people share it: model.safetensors in bf16."""
    path = CACHE / "model.safetensors"
    model = torch.load(checkpoint, weights_only=True)["model"]
    save_file({k: v.to(torch.bfloat16).clone() for k, v in model.items() if k != "lm_head.weight"}, path)
    return path


if __name__ == "__main__":
    main()
