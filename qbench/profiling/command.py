"""The job of `qbench profile`, without a command line: a model by name, random images, one profile."""

from __future__ import annotations

from typing import Any

import torch

from qbench.errors import ConfigError
from qbench.models import build_model
from qbench.one_call import prepare_by_target
from qbench.profiling.timeline import HostClock
from qbench.profiling.training_step import Step, mean_of_squares, profile_qat
from qbench.qconfig import get_qconfig
from qbench.report.profile import TrainingProfile

DEVICES = ("cpu", "cuda")
AUTOCAST = {"no": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Of the built model: the width of a head costs little.
_CLASSES = 1000


def profile_named(
    model: str,
    *,
    target: str = "onnxruntime",
    batch_size: int = 8,
    image_size: int = 224,
    device: str = "cpu",
    channels_last: bool = False,
    autocast: str = "no",
    low_memory: bool = False,
    fast_path: bool = False,
    rounds: int = 11,
    threads: int | None = None,
    **options: Any,
) -> TrainingProfile:
    """Profile a training step of a model with fresh weights on random images.

    Args:
        model: A torchvision classification name, or `file.py:function`.
        target: What it is prepared for.
        batch_size: Images in a step.
        image_size: Their height and width in pixels.
        device: `"cpu"` or `"cuda"`.
        channels_last: Whether images and weights are in that memory format.
        autocast: `"no"`, `"bfloat16"` or `"float16"`.
        low_memory: As for `profile_qat`.
        fast_path: As for `profile_qat`.
        rounds: As for `profile_qat`.
        threads: Threads of torch; None leaves them as they are.
        options: As for `get_qconfig`: weight_bits, method, …

    Raises:
        ConfigError: an unknown name, a number below 1, no CUDA, or what `profile_qat` refuses.
    """
    _check(batch_size=batch_size, image_size=image_size, threads=threads, rounds=rounds)
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device {device!r}: expected cpu, or cuda where PyTorch finds a GPU")
    if autocast not in AUTOCAST:
        raise ConfigError(f"autocast {autocast!r}: expected one of {', '.join(AUTOCAST)}")
    get_qconfig(target, **options)  # refuses before anything is built
    if threads is not None:
        torch.set_num_threads(threads)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    float_model = build_model(model, _CLASSES).to(device).train()
    float_model = float_model.to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(batch_size, 3, image_size, image_size, device=device).contiguous(memory_format=layout)
    # The weights are fresh: one step may move them.
    Step((images,), mean_of_squares, AUTOCAST[autocast], HostClock()).try_on(float_model, "float")
    return profile_qat(
        float_model,
        prepare_by_target(float_model, target, example_inputs=(images,), **options),
        example_inputs=(images,),
        low_memory=low_memory,
        fast_path=fast_path,
        autocast=AUTOCAST[autocast],
        rounds=rounds,
    )


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name.replace('_', ' ')} {value}: expected at least 1")
