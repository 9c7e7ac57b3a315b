"""Train a small GPT on the Python standard library's sources; save, and resume from, nanoGPT-style checkpoints.

    python examples/gpt.py --steps 300 --out ckpt.pt
    statecodec compress ckpt.pt && statecodec restore ckpt.sc.safetensors -o restored.pt
    python examples/gpt.py --resume restored.pt --steps 100 --out later.pt

The model, the data and the training loop are those of `statecodec demo`, in `statecodec_cli.demo`. Every loss goes to
standard output as one line of JSON; the same seed gives the same losses.
300 steps take about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ckpt.pt"), help="where to save (default: ckpt.pt)")
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint; sizes and settings are its own")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    for name, default in {"n-layer": 4, "n-head": 4, "n-embd": 192, "block-size": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def trainer(args: argparse.Namespace) -> Trainer:
    if args.resume:
        return Trainer.resume(args.resume, device=args.device)
    model = GPTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size)
    settings = ("batch_size", "lr", "beta2", "weight_decay", "seed", "device")
    return Trainer(TrainConfig(model=model, **{name: getattr(args, name) for name in settings}))


def main() -> None:
    args = arguments()
    run = trainer(args)
    run.run(args.steps, lambda step, loss: print(json.dumps({"step": step, "loss": loss}), flush=True))
    print(json.dumps({"step": run.step, "val_loss": run.validate(), "num_params": run.num_params}))
    run.save(args.out)


if __name__ == "__main__":
    main()
