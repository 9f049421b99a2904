"""The networks of the zoo: torchvision's classification and segmentation models, and the parts of its detectors.

Each is a float model from an image batch to tensors, at its own input size: the smallest that one of its published
weights is made for. Weights are random, as no machine of the project reaches the internet.
"""

from __future__ import annotations

import functools
import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qbench._torchvision import import_torchvision

SEGMENTATION = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
#: Detector -> its parts that are one convolutional network; what comes behind (boxes, proposals) is none.
DETECTION = {
    "fasterrcnn_resnet50_fpn": "backbone+rpn.head",
    "fasterrcnn_mobilenet_v3_large_fpn": "backbone+rpn.head",
    "maskrcnn_resnet50_fpn": "backbone+rpn.head",
    "retinanet_resnet50_fpn": "backbone+head",
    "fcos_resnet50_fpn": "backbone+head",
    "ssd300_vgg16": "backbone+head",
    "ssdlite320_mobilenet_v3_large": "backbone+head",
}
_SIZES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
_DETECTION_SIZE = 320
_SEGMENTATION_SIZE = 224


class Outputs(nn.Module):
    """A model, and every tensor that it puts out in one tuple.

    A forward that asks a value of a traced model for its type or its keys cannot be traced, so both are found out
    before, with one image.

    Args:
        parts: Modules, each called with what the one before puts out: a tensor, or a list of tensors.
        size: Of the image to try, in pixels.
    """

    def __init__(self, parts: list[nn.Module], size: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.places: list[list[tuple[Any, ...]]] = []
        given: Any = torch.zeros(1, 3, size, size)
        for part in parts:
            with torch.no_grad():
                found = part.eval()(given)
            part.train()
            paths = torch.utils._pytree.tree_flatten_with_path(found)[0]
            self.places.append([tuple(_index(key) for key in path) for path, _ in paths])
            given = [leaf for _, leaf in paths]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(batch, 3, high, wide) -> every tensor of the last part."""
        given: Any = images
        for part, places in zip(self.parts, self.places, strict=True):
            found = part(given)
            given = [functools.reduce(operator.getitem, place, found) for place in places]
        return tuple(given)


def _index(key: Any) -> Any:
    """What one step of a path into a nested output is indexed with."""
    return key.key if hasattr(key, "key") else key.idx


def names() -> list[str]:
    """Every network: 80 classifiers, then segmentation, then detectors' parts."""
    models = import_torchvision().models
    return [*models.list_models(module=models), *SEGMENTATION, *(f"{name}/{part}" for name, part in DETECTION.items())]


def build(name: str) -> tuple[nn.Module, int]:
    """A float model with random weights, and its input size in pixels."""
    models = import_torchvision().models
    if "/" in name:
        detector, _, parts = name.partition("/")
        size = _SIZES.get(detector, _DETECTION_SIZE)
        model = models.get_model(detector, weights=None, weights_backbone=None)
        return Outputs([model.get_submodule(part) for part in parts.split("+")], size), size
    if name in SEGMENTATION:
        model = models.get_model(name, weights=None, weights_backbone=None, aux_loss="lraspp" not in name or None)
        return Outputs([model], _SEGMENTATION_SIZE), _SEGMENTATION_SIZE
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = min(_crop(weights.transforms) for weights in models.get_model_weights(name))
    return models.get_model(name, weights=None, **options), size


def _crop(transforms: partial[Any]) -> int:
    """The image size of the transforms that belong to weights."""
    return int(transforms.keywords["crop_size"])
