"""Train a small GPT on the standard library's sources with any of the optimizers, and see its curve beside the others.

    python examples/train_gpt.py --optimizer adamw --plot curves.svg
    python examples/train_gpt.py --optimizer foam --plot curves.svg        # adds its curve
    python examples/train_gpt.py --optimizer adamw --bf16 --release
    python examples/train_gpt.py --optimizer muon --save ckpt.sc.safetensors
    python examples/train_gpt.py --optimizer muon --resume ckpt.sc.safetensors --steps 400    # goes on to step 400

The model, the data and the schedule are those of `examples/gpt.py`.
200 steps take about two minutes on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from train_setup import make, parser, progress, report

import statecodec
from statecodec import optim
from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer


def main() -> None:
    options = parser(__doc__, steps=200)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--save", type=Path, help="write model and encoded optimizer states, as they are")
    options.add_argument("--resume", type=Path, help="go on from such a file, bit for bit")
    args = options.parse_args()
    model = GPTConfig(block_size=96, n_layer=4, n_head=4, n_embd=128)
    config = TrainConfig(batch_size=args.batch_size, warmup=20, decay_steps=args.steps, seed=args.seed, model=model)
    trainer = Trainer(config)
    if args.bf16:
        trainer.model.to(torch.bfloat16)
    trainer.optimizer = make(args, trainer.model)
    trainer.config = TrainConfig(**{**vars(config), "lr": trainer.optimizer.param_groups[0]["lr"]})
    if args.resume:
        saved = statecodec.load(args.resume)
        trainer.model.load_state_dict(saved["model"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        trainer.step, trainer.losses = saved["step"], list(saved["losses"])
    if args.release:  # every gradient is gone before it could be clipped: a lower lr may be needed
        if not isinstance(trainer.optimizer, optim.StateOptimizer):
            options.error("--release needs one of this project's optimizers")
        optim.enable_gradient_release(trainer.model, trainer.optimizer)
    trainer.run(max(0, args.steps - trainer.step), progress(args.steps))
    if args.save:
        state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
        statecodec.save({**state, "step": trainer.step, "losses": trainer.losses}, args.save, force=True)
    report(args, trainer.optimizer, trainer.losses, {"val_loss": round(trainer.validate(), 4)})


if __name__ == "__main__":
    main()
