"""Small image models with weights drawn at random, which are never trained but for their adapters.

Such a model is the base in S. Chen et al. (RBLA, ICWS 2024, arXiv 2408.08699): not pre-trained, and frozen as it was drawn.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from anyrank.errors import ConfigError

__all__ = ["PLAIN", "Shape", "cnn", "mlp"]

Shape = tuple[int, int, int]
"""Of an image: channels, height, width."""


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers of 200 units with ReLU, as in RBLA's experiments: 784-200-200-10 for images of 28 x 28 in grey.

    Args:
        shape: of the images.
        classes: how many logits it gives.
    """
    return _MLP(shape, classes)


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Two convolutions, 5 x 5 with 32 and 64 channels, each with ReLU and a pooling by 2, then 512 units and the logits.

    This is the network of B. McMahan et al. (AISTATS 2017, arXiv 1602.05629) for images of 28 x 28. RBLA's own is not
    described; the choice is ours.

    Args:
        shape: of the images, at least 4 x 4.
        classes: how many logits it gives.

    Raises:
        ConfigError: images too small to be pooled twice.
    """
    if min(shape[1:]) < 4:
        raise ConfigError(
            f"model.name: cnn halves an image twice, and these are {shape[1]} x {shape[2]}; expected 4 x 4 or more. Use mlp."
        )
    return _CNN(shape, classes)


PLAIN: Mapping[str, Callable[[Shape, int], nn.Module]] = MappingProxyType({"cnn": cnn, "mlp": mlp})
"""By name, what makes a model for images of a shape and a number of classes.

A model takes images `[examples, channels, height, width]` and gives logits `[examples, classes]`.
"""


class _MLP(nn.Module):
    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        channels, height, width = shape
        self.linear1 = nn.Linear(channels * height * width, 200)
        self.linear2 = nn.Linear(200, 200)
        self.linear3 = nn.Linear(200, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear1(x.flatten(1)))
        return self.linear3(F.relu(self.linear2(x)))


class _CNN(nn.Module):
    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.linear1 = nn.Linear(64 * (height // 4) * (width // 4), 512)
        self.linear2 = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))
