"""A state dict of torch.ao's eager QAT or of MQBench, taken apart.

    <path>.weight, <path>.bn.running_mean, …            plain tensors, under the names that they have here, too
    <path>.weight_fake_quant.<entry>                    a weight's quantizer
    <path>.activation_post_process.<entry>              torch.ao: the quantizer of a module's output
    activation_post_process_<number>.<entry>            torch.ao in FX mode: a quantizer of the whole graph
    <node>_post_act_fake_quantizer.<entry>              MQBench: the quantizer after a node of its fx graph

Entries of a quantizer: scale, zero_point, observer_enabled, fake_quant_enabled, and what its observer keeps below
activation_post_process. (torch/ao/nn/intrinsic/qat/modules/conv_fused.py, torch/ao/quantization/fake_quantize.py;
ModelTC/MQBench: mqbench/custom_quantizer/model_quantizer.py, mqbench/fake_quantize/quantize_base.py.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qbench.errors import ConfigError

_BIAS = re.compile(r"(?P<name>.*?)\.?bias_fake_quant\.(?P<entry>.+)")
_WEIGHT = re.compile(r"(?P<name>.*?)\.?weight_fake_quant\.(?P<entry>.+)")
_OUTPUT = re.compile(r"(?P<name>.*?)\.?activation_post_process\.(?P<entry>.+)")
NUMBERED = re.compile(r"activation_post_process_\d+")
_NUMBERED_ENTRY = re.compile(rf"(?P<name>{NUMBERED.pattern})\.(?P<entry>.+)")
_NODE = re.compile(r"(?P<name>.+)_post_act_fake_quantizer\.(?P<entry>.+)")
_CONVERTED = re.compile(r"(_packed_params|(^|\.)quant\.scale$)")

# Names that BatchNorm had in version 1 of torch.ao's fused modules.
_OLD_NAMES = {
    "gamma": "bn.weight",
    "beta": "bn.bias",
    "running_mean": "bn.running_mean",
    "running_var": "bn.running_var",
    "num_batches_tracked": "bn.num_batches_tracked",
}


@dataclasses.dataclass(frozen=True)
class SourceQuantizer:
    """A quantizer in the checkpoint.

    Attributes:
        name: Of an activation's: path of the module (torch.ao) or name of the node (MQBench) that it follows. Of a
            weight's: path of the layer.
        keys: Entry → key of the checkpoint.
        tensors: Entry → tensor.
    """

    name: str
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def find(self, entry: str) -> Tensor | None:
        """The tensor of an entry, the observer's own entries among them."""
        return self.tensors.get(entry, self.tensors.get(f"activation_post_process.{entry}"))

    @property
    def seen_data(self) -> bool:
        """Whether its observer saw anything; one without a range has fixed values."""
        low, high = self.find("min_val"), self.find("max_val")
        if low is None or high is None:
            return "scale" in self.tensors
        return bool(low.numel()) and bool((low <= high).all()) and bool(torch.isfinite(high).all())


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint by kinds of keys.

    Attributes:
        kind: `"torch.ao"` or `"MQBench"`.
        plain: Key → tensor, of parameters and statistics.
        outputs: Quantizers of activations, by name.
        weights: Quantizers of weights, by path of the layer.
        biases: Keys of bias quantizers.
    """

    kind: str
    plain: dict[str, Tensor]
    outputs: dict[str, SourceQuantizer]
    weights: dict[str, SourceQuantizer]
    biases: tuple[str, ...]


def read_source(state_dict: Mapping[str, Any]) -> Source:
    """Sort the keys of a state dict.

    Raises:
        ConfigError: it is no state dict, one of a converted model, or one without any fake-quantize module.
    """
    tensors = _checked(state_dict)
    is_mqbench = any(_NODE.fullmatch(key) for key in tensors)
    plain: dict[str, Tensor] = {}
    outputs: dict[str, SourceQuantizer] = {}
    weights: dict[str, SourceQuantizer] = {}
    biases = []
    for key, tensor in tensors.items():
        match, kind = _WEIGHT.fullmatch(key), weights
        if match is None:
            match = (_NODE if is_mqbench else _NUMBERED_ENTRY).fullmatch(key) or _OUTPUT.fullmatch(key)
            kind = outputs
        if _BIAS.fullmatch(key):
            biases.append(key)
        elif match is not None:
            found = kind.setdefault(match["name"], SourceQuantizer(match["name"]))
            found.keys[match["entry"]], found.tensors[match["entry"]] = key, tensor
        else:
            plain[key] = tensor
    if not outputs and not weights:
        raise ConfigError(
            "load_qat_checkpoint: no key is one of a fake-quantize module, so this is no QAT checkpoint of torch.ao or "
            "MQBench. model.load_state_dict(state_dict) loads one of qbench; float weights are loaded before fuse"
        )
    return Source("MQBench" if is_mqbench else "torch.ao", plain, outputs, weights, tuple(biases))


def present_name(key: str) -> str:
    """The name that a key of an old fused module has today; the key itself if it has none."""
    path, _, name = key.rpartition(".")
    return f"{path}.{_OLD_NAMES[name]}" if path and name in _OLD_NAMES else key


def without_prefix(state_dict: Mapping[str, Any], prefix: str = "module.") -> Mapping[str, Any]:
    """The state dict of a model that was wrapped in DataParallel or DDP, without the wrapper's name."""
    if state_dict and all(isinstance(key, str) and key.startswith(prefix) for key in state_dict):
        return {key[len(prefix) :]: value for key, value in state_dict.items()}
    return state_dict


def _checked(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ConfigError(
            f"load_qat_checkpoint: got {type(state_dict).__name__}, expected the state dict of a QAT model, such as "
            "torch.load(path)"
        )
    converted = [key for key in state_dict if isinstance(key, str) and _CONVERTED.search(key)]
    if converted:
        raise ConfigError(
            f"load_qat_checkpoint: {converted[0]!r} is of a converted model, which has no float weights any more; save "
            "the state dict of the model before torch.ao's convert"
        )
    wrong = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    inner = [key for key in wrong if isinstance(state_dict[key], Mapping)]
    if inner:
        raise ConfigError(f"load_qat_checkpoint: pass the state dict inside, checkpoint[{inner[0]!r}]")
    return {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
