"""The same training step of a float model and of its QAT form, in turns, and what each layer has of it.

    step      forward → loss → backward → SGD (learning rate 0: it costs the same, and nothing runs away)
    round     a step of each model that nobody watches, then one of each that is watched
    figures   medians over the rounds

All of it happens on copies.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qbench.errors import ConfigError, QBenchError
from qbench.fusion import fuse
from qbench.nn.qat.switches import enable_fast_path, enable_low_memory
from qbench.profiling.pairs import Pairs, has_quantized, in_training, paired_layers, prepared, twin_of
from qbench.profiling.saved import counting_saved
from qbench.profiling.timeline import OPTIMIZER, OUTSIDE, Clock, CudaClock, HostClock, Watch
from qbench.qconfig import QConfig
from qbench.report.profile import Cost, Row, TrainingProfile

Loss = Callable[[Any], Tensor]
_Shares = Mapping[tuple[str, str], float]

#: Steps of each model before anything is measured: the first ones find ranges and get memory from the system.
WARM_UP = 2
_PHASES = ("forward", "backward", "update")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def profile_qat(
    model: nn.Module,
    qat_model: nn.Module | None = None,
    *,
    example_inputs: tuple[Any, ...],
    qconfig: QConfig | None = None,
    low_memory: bool = False,
    fast_path: bool = False,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    rounds: int = 11,
) -> TrainingProfile:
    """Measure a training step of a float model and of its QAT form, and say which layer the difference lies in.

    Eager mode, on the device of the model: CPU or CUDA. Neither model is changed, nor the random state.

    Args:
        model: The float model, fused or not. One in eval is measured in training mode; of one in training every module
            keeps its own mode.
        qat_model: Its QAT form; without one, `model` is fused and prepared.
        example_inputs: One tuple of inputs: a batch of the size that you train with.
        qconfig: Of the QAT form, where there is none yet; the default is the model's own, or `get_qconfig()`.
        low_memory: Whether the QAT form saves codes for backward: see `enable_low_memory`.
        fast_path: Whether it trains by generated code: see `enable_fast_path`.
        loss: Makes a scalar of what a model returns; the default is the mean of squares.
        autocast: Run forwards under autocast to this dtype, `torch.bfloat16` say.
        rounds: How often each model takes a step of either kind.

    Returns:
        The profile: `print(profile)`, `profile.table(order="model")`, `profile.rows`, `profile.to_json()`.

    Raises:
        ConfigError: an argument that is none of the above: no inputs, inputs that the model cannot run on, a compiled
            model, a QAT form of another model.
        PreparationError: nothing is quantized.
        FusionError, LinkError, NumericsError: as `fuse` and `prepare_qat`.
    """
    _check(model, qat_model, example_inputs, qconfig, rounds)
    device = _device_of(model, example_inputs)
    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
    with _undisturbed(device):
        step = Step(example_inputs, loss or mean_of_squares, autocast, clock)
        fused = in_training(fuse(model))
        step.try_on(fused, "float")
        qat = prepared(fused, qconfig, example_inputs) if qat_model is None else copy.deepcopy(qat_model)
        qat = in_training(qat)
        if low_memory:
            qat.apply(enable_low_memory)
        if fast_path:
            qat.apply(enable_fast_path)
        models = {"float": twin_of(qat, model, fused), "QAT": qat}
        step.try_on(qat, "QAT")
        pairs = paired_layers(models["float"], qat)
        found = _measured(step, models, pairs, rounds)
    return _profile(type(model).__name__, found, pairs, step.settings(device), rounds)


def mean_of_squares(output: Any) -> Tensor:
    """`Σ mean(y²)` over the tensors of a model's output that have a gradient: needs no labels, and reaches all.

    Raises:
        ConfigError: there is none.
    """
    tensors = [y for y in pytree.tree_leaves(output) if isinstance(y, Tensor) and y.requires_grad]
    if not tensors:
        raise ConfigError(
            f"profile_qat: the model returns {type(output).__name__} without a tensor that has a gradient; give a loss "
            "that makes a scalar of it: profile_qat(model, example_inputs=(x,), loss=lambda output: ...)"
        )
    return torch.stack([y.float().square().mean() for y in tensors]).sum()


@dataclasses.dataclass
class Step:
    """What a training step is, of whatever model."""

    inputs: tuple[Any, ...]
    loss: Loss
    autocast: torch.dtype | None
    clock: Clock

    def take(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> _Shares:
        """One step; seconds by owner and phase. Without layers, nothing but the phases is marked."""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        optimizer.zero_grad(set_to_none=True)
        inputs = self._fresh_inputs()
        self.clock.settle()
        with Watch(layers, self.clock) as watch:
            watch.begin("forward")
            loss = self._forward(model, inputs)
            watch.follow(loss)
            watch.begin("backward")
            loss.backward()
            watch.begin("update", OPTIMIZER)
            optimizer.step()
            watch.end()
        return watch.shares()

    def saved(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, int]:
        """Bytes that a step saves for backward, by owner."""
        inputs = self._fresh_inputs()
        owned = [*model.parameters(), *model.buffers(), *(x for x in pytree.tree_leaves(inputs) if _is_tensor(x))]
        with Watch(layers, self.clock) as watch, counting_saved(owned, lambda: watch.owner) as found:
            loss = self._forward(model, inputs)
        loss.backward()
        return found

    def try_on(self, model: nn.Module, name: str) -> None:
        """Take the first step, and say what is wrong where that fails."""
        try:
            self.take(model, {})
        except QBenchError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"profile_qat: the {name} model cannot take a training step on inputs {_shapes(self.inputs)}: "
                f"{reason}; example_inputs is one tuple of what the model is called with in training"
            ) from error

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What the figures depend on, beside the model."""
        cuda = device.type == "cuda"
        return {
            "inputs": _shapes(self.inputs),
            "dtype": str(self.autocast or torch.get_default_dtype()).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if cuda else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _forward(self, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        device = _device_of(model, inputs).type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            loss = self.loss(model(*inputs))
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"profile_qat: the loss is {given}; expected a scalar that depends on the parameters")
        return loss

    def _fresh_inputs(self) -> Any:
        """Copies: a model may write to its inputs."""
        return pytree.tree_map(
            lambda x: x.detach().clone().requires_grad_(x.requires_grad) if _is_tensor(x) else x, self.inputs
        )


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Of one model, by rounds: whole steps that nobody watches, shares of watched ones; bytes saved by owner."""

    whole: list[_Shares]
    shares: list[_Shares]
    saved: Mapping[str, int]

    def cost(self, owner: str) -> Cost:
        """What one owner costs."""
        times = {phase: statistics.median(one.get((owner, phase), 0.0) for one in self.shares) for phase in _PHASES}
        return Cost(**times, saved=self.saved.get(owner, 0))

    def seconds(self) -> list[float]:
        """Of each whole step."""
        return [sum(one.values()) for one in self.whole]

    def step(self) -> Cost:
        """A whole step."""
        times = {
            phase: statistics.median(sum(value for (_, at), value in one.items() if at == phase) for one in self.whole)
            for phase in _PHASES
        }
        return Cost(**times, saved=sum(self.saved.values()))


def _measured(
    step: Step, models: Mapping[str, nn.Module], pairs: Pairs, rounds: int
) -> dict[str, _Measured]:
    layers = {name: {path: pair[i] for path, pair in pairs.items()} for i, name in enumerate(models)}
    found = {}
    for name, model in models.items():
        for _ in range(WARM_UP):
            step.take(model, layers[name])
        found[name] = _Measured([], [], step.saved(model, layers[name]))
    for _ in range(rounds):
        for name, model in models.items():
            found[name].whole.append(step.take(model, {}))
        for name, model in models.items():
            found[name].shares.append(step.take(model, layers[name]))
    return found


def _profile(
    name: str,
    found: Mapping[str, _Measured],
    pairs: Pairs,
    settings: dict[str, Any],
    rounds: int,
) -> TrainingProfile:
    plain, qat = found["float"], found["QAT"]

    def row(owner: str, *modules: nn.Module) -> Row:
        kind, qat_kind = [type(module).__name__ for module in modules] or ("", "")
        return Row(owner, kind, qat_kind, plain.cost(owner), qat.cost(owner))

    rows = [row(path, *pair) for path, pair in pairs.items()]
    ratios = [own / base for own, base in zip(qat.seconds(), plain.seconds(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return TrainingProfile(
        model=name,
        layers=tuple(row for row in rows if row.in_float.seconds or row.in_qat.seconds),
        outside=row(OUTSIDE),
        optimizer=row(OPTIMIZER),
        float_step=plain.step(),
        qat_step=qat.step(),
        ratio=(low, middle, high),
        rounds=rounds,
        settings=settings,
    )


def _check(
    model: nn.Module, qat_model: nn.Module | None, example_inputs: Any, qconfig: QConfig | None, rounds: int
) -> None:
    _check_model("model", model)
    if qat_model is not None:
        _check_model("qat_model", qat_model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"profile_qat: {type(model).__name__} has no parameter that is trained; a step needs one")
    if has_quantized(model):
        raise ConfigError("profile_qat: model has QAT modules; expected profile_qat(float_model, qat_model, ...)")
    if qat_model is not None and qconfig is not None:
        raise ConfigError("profile_qat: a qat_model has its qconfig already; give one of the two")
    if not isinstance(example_inputs, tuple) or not example_inputs:
        nothing = example_inputs is None or isinstance(example_inputs, tuple)
        given = "none" if nothing else f"a {type(example_inputs).__name__}"
        raise ConfigError(
            f"profile_qat: example_inputs: got {given}, expected one tuple of the model's inputs: "
            "profile_qat(model, example_inputs=(images,))"
        )
    if rounds < 1:
        raise ConfigError(f"profile_qat: rounds={rounds}: expected at least 1")


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"profile_qat: {name} is {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, _PARALLEL):
        raise ConfigError(f"profile_qat: {name} is wrapped in {type(model).__name__}; give {name}.module")
    if any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) for one in model.modules()):
        raise ConfigError(
            f"profile_qat: {name} is compiled, and compiled code has no layers to tell apart; give the module before "
            "torch.compile (its _orig_mod)"
        )


def _device_of(model: nn.Module, inputs: tuple[Any, ...]) -> torch.device:
    tensors = [*model.parameters(), *(x for x in pytree.tree_leaves(inputs) if _is_tensor(x))]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"profile_qat: the model is on {device}; it is measured on CPU or CUDA: model.cpu()")
    return device


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Gradients are on, whatever surrounds the call, and the random state is put back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        yield


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _shapes(inputs: Any) -> str:
    """`(8, 3, 224, 224)`; of several tensors, one after the other."""
    return ", ".join(str(tuple(x.shape)) for x in pytree.tree_leaves(inputs) if _is_tensor(x)) or "(no tensors)"
