"""What `resume` makes of checkpoints that transformers' Trainer writes: GPT-2 in fp32, Llama in bf16, middle-sized.

python benchmarks/huggingface.py        -> benchmarks/results/huggingface.json
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import record
from tasks import corpus

import statecodec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BLOCK, STEPS = 64, 60
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}


def main() -> None:
    """Train both, and record."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=BLOCK, n_embd=256, n_layer=6, n_head=4, **SPECIAL))
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
                    num_key_value_heads=2, **SPECIAL)
    ).bfloat16()  # fmt: skip
    record("huggingface", {"gpt2, fp32": measured(gpt2), "llama, bf16": measured(llama, bf16=True)})


def measured(model: torch.nn.Module, **options: Any) -> dict[str, Any]:
    """Ratios of the directory that Trainer writes half-way, and how many moments have a name.

    At half of the highest learning rate: at the end, where it is 0, a step is no measure.
    """
    from transformers import Trainer, TrainingArguments

    text = corpus().train
    tokens = [text[i * BLOCK : (i + 1) * BLOCK].long() for i in range(2 * STEPS * 8)]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2 * STEPS, save_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-3,
            report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, logging_strategy="no", **options,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=[{"input_ids": t, "labels": t} for t in tokens]).train()
        saved = Path(folder) / f"checkpoint-{STEPS}"
        made = {preset: statecodec.compress(saved, preset=preset, force=True) for preset in ("lossless", "resume")}
    moments = [t for t in made["resume"].tensors if t.role in ("exp_avg", "exp_avg_sq")]
    ratios = {preset: round(report.ratio or 0.0, 3) for preset, report in made.items()}
    return {
        "params": made["resume"].num_params, "bytes": made["resume"].source["bytes"], "moments": len(moments),
        "named": sum(t.param is not None for t in moments), "ratio": ratios,
    }  # fmt: skip


if __name__ == "__main__":
    main()
