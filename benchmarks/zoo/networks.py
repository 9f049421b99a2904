"""The networks of the zoo: torchvision's classification and segmentation models, and the parts of its detectors.

Each is a float model from an image batch to tensors, at its own input size: the smallest that one of its published
weights is made for. Weights are random, as no machine of the project reaches the internet.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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


class Whole(nn.Module):
    """A model whose outputs are a dict: its main output alone, auxiliary heads run in training only.

    Args:
        model: A segmentation model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(batch, 3, high, wide) -> (batch, classes, high, wide)."""
        found = self.model(images)
        return (found["out"], found["aux"]) if self.training and "aux" in found else (found["out"],)


class Parts(nn.Module):
    """The backbone of a detector and, behind it, a head.

    Args:
        backbone: Images -> features by name.
        head: List of features -> lists or dicts of tensors; None for the features themselves.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(batch, 3, high, wide) -> every tensor of the last part."""
        features = self.backbone(images)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        found: Any = features if self.head is None else self.head(features)
        if isinstance(found, dict):
            return tuple(found.values())
        return tuple(tensor for part in found for tensor in (part if isinstance(part, list) else [part]))


def names() -> list[str]:
    """Every network: 80 classifiers, then segmentation, then detectors' parts."""
    models = import_torchvision().models
    return [*models.list_models(module=models), *SEGMENTATION, *(f"{name}/{part}" for name, part in DETECTION.items())]


def build(name: str) -> tuple[nn.Module, int]:
    """A float model with random weights, and its input size in pixels."""
    models = import_torchvision().models
    if "/" in name:
        return _detector_part(models, *name.split("/")), _SIZES.get(name.split("/")[0], _DETECTION_SIZE)
    if name in SEGMENTATION:
        model = models.get_model(name, weights=None, weights_backbone=None, aux_loss="lraspp" not in name or None)
        return Whole(model), _SEGMENTATION_SIZE
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = min(_crop(weights.transforms) for weights in models.get_model_weights(name))
    return models.get_model(name, weights=None, **options), size


def _detector_part(models: Any, name: str, part: str) -> nn.Module:
    detector = models.get_model(name, weights=None, weights_backbone=None)
    _, _, head = part.partition("+")
    return Parts(detector.backbone, detector.get_submodule(head) if head else None)


def _crop(transforms: partial[Any]) -> int:
    """The image size of the transforms that belong to weights."""
    return int(transforms.keywords["crop_size"])
