"""Which layers follow each other in a float model: one forward is recorded, operator by operator.

Operators are those of ATen, of which there are few, so a module, a function and a method are all the same here. A layer
and the next make a pair if every operator between them

    - has one reader, which is the next of the chain,
    - is positively homogeneous, f(s·x) = s·f(x) for s > 0, and
    - keeps channels apart: those of axis 1 stay on axis 1, or each becomes `features` neighbours (flatten).

A parameter that is read more than once (a layer that is called twice, a tied weight), or a weight that is computed from
others, stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qbench.errors import ConfigError
from qbench.modes import evaluating
from qbench.nn.qat.body import QatModule
from qbench.numerics.fold import BatchNormTensors, WeightLayout, fold_factor

_CONV = "convolution"
_LINEAR = ("addmm", "mm")
_BATCH_NORM = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training")
# Positively homogeneous, channel by channel.
_HOMOGENEOUS = frozenset(
    {"relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "rrelu_with_noise", "clone", "detach", "alias"}
    | {f"{kind}_pool{dims}d" for kind in ("avg", "_adaptive_avg", "adaptive_max") for dims in (1, 2, 3)}
    | {f"max_pool{dims}d_with_indices" for dims in (2, 3)}
    | {f"{kind}_pad{dims}d" for kind in ("reflection", "replication") for dims in (1, 2, 3)}
    | {f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d")}
)
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"})
_CLAMPS = frozenset({"hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_max", "clamp_max_"})


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """A layer that is left as it is: path and reason."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class AffineNorm:
    """A BatchNorm with running statistics and affine parameters, each (out,)."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer as it was called.

    Attributes:
        path: Of the module that holds the weight.
        weight: The parameter itself.
        bias: The parameter itself, or None.
        layout: Where the weight keeps its output channels; `groups` for convolutions of either kind.
        bn: The BatchNorm that follows, or None.
        features: Of a linear layer as the second of a pair: values of each input channel.
    """

    path: str
    weight: Tensor
    bias: Tensor | None
    layout: WeightLayout
    bn: AffineNorm | None = None
    features: int = 1

    def fold_factor(self) -> Tensor | None:
        """`k`, (out,), or None without a BatchNorm."""
        bn = self.bn
        return None if bn is None else fold_factor(BatchNormTensors(bn.gamma, bn.beta, bn.mean, bn.var, bn.eps))


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two layers, the second of which reads the channels of the first and nothing else."""

    first: Layer
    second: Layer
    channels: int


class Refused(Exception):
    """Why a chain ends."""


@dataclasses.dataclass(eq=False)
class _Call:
    name: str
    args: tuple[Any, ...]
    out: Tensor
    readers: list[_Call] = dataclasses.field(default_factory=list)
    is_output: bool = False


class _Recorder(TorchDispatchMode):
    """Every operator of a forward, and who reads what it puts out; tensors are held, so that ids stay theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.producer: dict[int, _Call] = {}
        self.reads: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if not tensors:
            return result
        call = _Call(func.__name__.split(".")[0], args, tensors[0])
        for read in tree_leaves((args, kwargs)):
            if isinstance(read, Tensor):
                self.reads[id(read)] += 1
                if id(read) in self.producer:
                    self.producer[id(read)].readers.append(call)
        # An operator in place puts out the tensor that it was given: later readers read this call.
        self.producer.update(dict.fromkeys(map(id, tensors), call))
        self.calls.append(call)
        return result


def find_pairs(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[list[Pair], list[SkippedLayer]]:
    """The pairs of a float model, in the order of the forward, and every layer that is not the first of one.

    Raises:
        ConfigError: the model is prepared already.
    """
    prepared = next((name for name, module in model.named_modules() if isinstance(module, QatModule)), None)
    if prepared is not None:
        raise ConfigError(
            f"equalize: {prepared or 'the model'} is a QAT module; equalize the float model, then prepare_qat"
        )
    recorder = _Recorder()
    with evaluating(model), recorder:
        out = model(*example_inputs)
    for leaf in tree_leaves(out):
        if id(leaf) in recorder.producer:
            recorder.producer[id(leaf)].is_output = True
    return _Chains(model, recorder).pairs()


class _Chains:
    """Reads pairs off a recording."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        self.calls, self.producer, self.reads = recorder.calls, recorder.producer, recorder.reads
        self.names = {id(p): name for name, p in model.named_parameters()}

    def pairs(self) -> tuple[list[Pair], list[SkippedLayer]]:
        """Pairs, and the layers that are the first of none."""
        found, skipped = [], []
        for call in self.calls:
            weight = self.weight_of(call)
            if weight is None:
                continue
            try:
                found.append(self.pair(call))
            except Refused as reason:
                skipped.append(SkippedLayer(self.path(weight) or f"({call.name})", str(reason)))
        return found, skipped

    def weight_of(self, call: _Call) -> Tensor | None:
        """The weight of a layer; None where the call is none."""
        if call.name == _CONV:
            return call.args[1]
        if call.name in _LINEAR:
            source = self.producer.get(id(call.args[-1]))
            return source.args[0] if source is not None and source.name == "t" else None
        return None

    def path(self, parameter: Tensor) -> str:
        return self.names.get(id(parameter), "").rpartition(".")[0]

    def layer(self, call: _Call) -> Layer:
        """The layer of a call, its parameters checked."""
        weight = self.weight_of(call)
        if weight is None:
            raise Refused(f"{call.name} with a weight that is computed reads it")
        bias = call.args[2] if call.name == _CONV else call.args[0] if call.name == "addmm" else None
        for parameter in (weight, bias):
            self.check_own(parameter)
        transposed, groups = (call.args[6], call.args[8]) if call.name == _CONV else (False, 1)
        return Layer(self.path(weight), weight, bias, WeightLayout(transposed, groups))

    def check_own(self, parameter: Tensor | None) -> None:
        """Raise Refused unless it is a parameter that is read once."""
        if parameter is None:
            return
        if id(parameter) not in self.names:
            raise Refused("a weight or bias is computed from others, or no parameter")
        if self.reads[id(parameter)] > 1:
            raise Refused(f"{self.names[id(parameter)]} is read {self.reads[id(parameter)]} times in one forward")

    def pair(self, call: _Call) -> Pair:
        first = self.layer(call)
        channels = first.layout.out_channels(first.weight)
        bn, last = None, call
        for position, step in enumerate(self.steps(call)):
            last = step
            if step.name in _BATCH_NORM and not position:
                bn = self.batch_norm(step)
            elif step.name == _CONV or step.name in _LINEAR:
                return Pair(dataclasses.replace(first, bn=bn), self.second(step, channels), channels)
            else:
                _check_step(step, channels)
        raise Refused(f"nothing reads what {last.name} puts out")

    def steps(self, call: _Call) -> Iterator[_Call]:
        """The one reader of a call, its one reader, and so on."""
        while True:
            if call.is_output:
                raise Refused("it is an output of the model")
            readers = list(dict.fromkeys(call.readers))
            if len(readers) != 1:
                names = ", ".join(reader.name for reader in readers) or "nothing"
                raise Refused(f"{len(readers)} operators read it: {names}")
            reader = readers[0]
            data = reader.args[1] if reader.name == "addmm" else reader.args[0]
            if data is not call.out:
                raise Refused(f"{reader.name} reads it beside other values")
            call = reader
            yield call

    def batch_norm(self, call: _Call) -> AffineNorm:
        # (input, γ, β, μ, σ², [training,] momentum, ε)
        gamma, beta, mean, var = call.args[1:5]
        training = call.args[5] if len(call.args) == 8 else False
        if gamma is None or beta is None:
            raise Refused("its BatchNorm has no γ and β to scale")
        if mean is None or var is None or training:
            raise Refused("its BatchNorm normalises with the statistics of the batch")
        for parameter in (gamma, beta):
            self.check_own(parameter)
        return AffineNorm(gamma, beta, mean, var, call.args[-1])

    def second(self, call: _Call, channels: int) -> Layer:
        """The layer that reads a chain, with the number of values that each channel has there."""
        layer = self.layer(call)
        if call.name == _CONV:
            return layer
        data = call.args[1] if call.name == "addmm" else call.args[0]
        if data.shape[1] % channels:
            raise Refused(f"{data.shape[1]} features of {call.name} are not those of {channels} channels")
        return dataclasses.replace(layer, features=data.shape[1] // channels)


def _check_step(call: _Call, channels: int) -> None:
    """Raise Refused unless an operator is positively homogeneous and keeps channels apart."""
    if call.name in _HOMOGENEOUS:
        return
    if call.name in _CLAMPS:
        raise Refused(f"{call.name} (ReLU6 is one) is not positively homogeneous: its bound would have to move")
    if call.name in _BATCH_NORM:
        raise Refused(f"{call.name} does not follow the layer itself, so it is no part of it")
    if call.name == "constant_pad_nd":
        _check_padding(call)
    elif call.name in _RESHAPES:
        _check_reshape(call, channels)
    elif call.name == "mean":
        _check_mean(call)
    else:
        raise Refused(f"{call.name} reads it, which is not known to be positively homogeneous channel by channel")


def _check_padding(call: _Call) -> None:
    value = call.args[2] if len(call.args) > 2 else 0
    axes = call.out.ndim - len(call.args[1]) // 2
    if value != 0 or axes < 2:
        raise Refused(f"constant_pad_nd pads with {value} from axis {axes} on; zeros beside the pixels would scale")


def _check_reshape(call: _Call, channels: int) -> None:
    before, after = call.args[0].shape, call.out.shape
    # (batch, channels, …) -> (batch, channels, …) or (batch, channels·features)
    kept = len(after) > 1 and before[0] == after[0] and (after[1] == channels or len(after) == 2)
    if not kept or after[1] % channels:
        raise Refused(f"{call.name} of {tuple(before)} to {tuple(after)} does not keep the channels on axis 1")


def _check_mean(call: _Call) -> None:
    dims = call.args[1] if len(call.args) > 1 else None
    axes = {dim % call.args[0].ndim for dim in dims} if dims else {0, 1}
    if axes & {0, 1}:
        raise Refused(f"mean over axes {sorted(axes)} mixes channels")
