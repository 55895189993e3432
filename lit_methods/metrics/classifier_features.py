"""A small classifier whose hidden layer stands in for Inception's where there is no network to download it from."""

import torch
from torch import Tensor, nn


class ClassifierFeatures(nn.Module):
    """Features of a convolutional classifier, for ``torchmetrics.image.FrechetInceptionDistance(feature=...)``.

    Distances in its features can be compared among models that were measured with the same classifier, not with
    published numbers. Train it as any classifier of ``(x, y)`` batches, or by :meth:`fit`; it measures in evaluation
    mode always.

    Args:
        in_channels: channels of the images, >= 1.
        num_classes: number of classes, >= 2.
        num_features: length of the features, >= 1.
        image_size: height and width, divisible by 4.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, num_features: int = 64, image_size: int = 28
    ) -> None:
        super().__init__()
        if min(in_channels, num_features) < 1 or num_classes < 2:
            raise ValueError(
                "in_channels and num_features must be >= 1 and num_classes >= 2, got "
                f"{in_channels}, {num_features} and {num_classes}"
            )
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size must be divisible by 4, got {image_size}")
        self.num_features = num_features
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (image_size // 4) ** 2, num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(batch, num_features)`` of images."""
        return self.body(x.float())

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``."""
        return self.head(self(x))

    def fit(self, x: Tensor, y: Tensor, epochs: int = 3, batch_size: int = 128, seed: int = 0) -> float:
        """Train on labelled images and freeze; returns the accuracy on them. Draws from ``seed`` only."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                    loss = nn.functional.cross_entropy(self.logits(x[rows]), y[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        self.eval().requires_grad_(False)
        right = [(self.logits(a).argmax(1) == b).sum() for a, b in zip(x.split(512), y.split(512), strict=True)]
        return float(torch.stack(right).sum() / len(x))
