"""Train a small convolutional net on scikit-learn's bundled digits with any of the optimizers.

Takes about half a minute on two CPU cores, a few minutes with --bf16, which CPUs are slow at.

pip install scikit-learn
python examples/train_digits.py --optimizer adamw --plot digits.svg
for o in sgd lion foam slimadam lorapre muon; do
    python examples/train_digits.py --optimizer $o --plot digits.svg
done
"""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from train_setup import make, parser, progress, report

from statecodec import optim


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1437, 1, 8, 8) and labels, test images and labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def rate(step: int, steps: int) -> float:
    """Warm-up over a tenth of the steps (low-rank moments need it), then a cosine to zero."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def main() -> None:
    args = parser(__doc__, steps=300).parse_args()
    images, labels, test_images, test_labels = data()
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = network().to(dtype)
    optimizer = make(args, model)
    if args.release and isinstance(optimizer, optim.StateOptimizer):
        optim.enable_gradient_release(model, optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: rate(t, args.steps))
    losses, watch = [], progress(args.steps)
    for step in range(args.steps):
        batch = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(args.seed * 100_003 + step))
        loss = nn.functional.cross_entropy(model(images[batch].to(dtype)).float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        watch(step + 1, losses[-1])
    with torch.no_grad():
        accuracy = float((model(test_images.to(dtype)).argmax(-1) == test_labels).float().mean())
    report(args, optimizer, losses, {"loss": round(sum(losses[-20:]) / 20, 4), "test_accuracy": round(accuracy, 4)})


if __name__ == "__main__":
    main()
