"""The base of every QAT module: what differs between modules is class data.

A QAT module owns the quantizer of its output and, if it has parameters, those of its weight and bias (`layer.py`). It
knows the quantizer of each of its inputs, so that a layer knows `s_in`: a *link*, kept as a strong reference that is
not a submodule (it survives deepcopy, pickle and `.to()`). An input that no quantizer produced gets one here, in
`input_quantizers`.

    y = FQ(op(x̂₀, x̂₁, …) ; s_y)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from qbench.attributes import own_attributes
from qbench.errors import FusionError, LinkError, PreparationError
from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.producers import producer_of
from qbench.nn.frozen import known_types
from qbench.nn.ops import spread
from qbench.nn.qat.compiled_step import Grid, clip_rule_of, compiled_clip
from qbench.nn.qat.epilogue import Clip, clip_of, epilogue, fused_epilogue, generated_epilogue
from qbench.nn.qat.prepared import prepared
from qbench.numerics.blocks import at_hand
from qbench.numerics.generated import DEVICES
from qbench.numerics.qparams import QParams
from qbench.qconfig import QConfig

Self = TypeVar("Self", bound="QatModule")


class QatModule(nn.Module):
    """Base of QAT layers and QAT ops: links, input quantizers, output quantizer.

    Attributes:
        float_type: The float module that this is the QAT form of.
        qconfig: What it is quantized to.
        input_quantizers: Quantizers of inputs that arrive in float, or on a grid that is not to be kept, by position.
        output_quantizer: Quantizer of the output; None where activations stay float (weight-only).
        fast_path: Whether training takes generated code where there is some: see `enable_fast_path`.
        low_memory: Whether activations are saved for backward as codes: see `enable_low_memory`.
        path: Which code the last eager forward in training took, one of `qbench.report.paths.PATHS`; empty before it.
    """

    # Any: a subclass names a float type that does not derive from its base's.
    float_type: ClassVar[Any]
    #: How many of the tensors that it is called with, counted from the first, lie on grids; None for all of them.
    data_inputs: ClassVar[int | None] = None
    #: Whether a parameter that is an operand gets a grid with zero point 0, as the factors of a matrix product need.
    symmetric_parameters: ClassVar[bool] = False
    fast_path = False
    low_memory = False
    path = ""

    qconfig: QConfig
    input_quantizers: nn.ModuleDict
    output_quantizer: FakeQuantize | None
    _sources: tuple[FakeQuantize, ...] | None
    _requantized: tuple[int, ...]

    @classmethod
    def from_float(cls: type[Self], module: nn.Module, qconfig: QConfig | None = None) -> Self:
        """The QAT form of a float module, which it takes the parameters and submodules of.

        Args:
            module: Of type `float_type`, with a `qconfig` unless one is given.
            qconfig: What to quantize to; the default is `module.qconfig`.

        Raises:
            FusionError: the module is of another type.
            PreparationError: there is no qconfig.
        """
        if cls.float_type not in known_types(module):
            raise FusionError(
                f"{cls.__name__}.from_float: got {type(module).__name__}, expected {cls.float_type.__name__}; "
                f"{cls.__name__}.from_float({cls.float_type.__name__}(...)) works"
            )
        qconfig = qconfig if qconfig is not None else getattr(module, "qconfig", None)
        if not isinstance(qconfig, QConfig):
            raise PreparationError(
                f"{cls.__name__}.from_float: the module's qconfig is {qconfig!r}; set module.qconfig = "
                "qbench.get_qconfig() or pass qconfig="
            )
        qat = cls.__new__(cls)
        nn.Module.__init__(qat)
        qat._adopt(module, qconfig)
        qat.train(module.training)
        return qat

    @classmethod
    def accepts(cls, module: nn.Module, qconfig: QConfig) -> str:
        """Why this very module stays float under this qconfig, for the preparation report; empty where it does not.

        Here: without quantized activations, an operation has nothing to quantize.
        """
        return "weight-only quantization: it computes in float, on float activations" if qconfig.weight_only else ""

    @classmethod
    def keeps_grid(cls, module: nn.Module) -> bool:
        """Whether this very module only moves or repeats values, so that there is nothing to quantize."""
        return False

    @classmethod
    def data_tensors(cls, inputs: Iterable[Any]) -> tuple[Tensor, ...]:
        """Of what a call gets, the tensors that lie on grids; integers and masks lie on none."""
        tensors = (value for value in spread(inputs) if isinstance(value, Tensor) and value.is_floating_point())
        return tuple(itertools.islice(tensors, cls.data_inputs))

    def _adopt(self, module: nn.Module, qconfig: QConfig) -> None:
        adopt_state(self, module)
        self._add_quantizers(qconfig)

    def to_float(self) -> nn.Module:
        """The float module with the trained parameters."""
        module = self.float_type.__new__(self.float_type)
        nn.Module.__init__(module)
        adopt_state(module, self)
        return module.train(self.training)

    def _add_quantizers(self, qconfig: QConfig) -> None:
        self.qconfig = qconfig
        self.input_quantizers = nn.ModuleDict()
        self.output_quantizer = None if qconfig.weight_only else self._make_output(qconfig)
        self._sources, self._requantized = None, ()

    def _make_output(self, qconfig: QConfig) -> FakeQuantize:
        return qconfig.make_output(self.output_op)

    @property
    def output_op(self) -> str:
        """Name of the float class that computes what is put out."""
        return str(self.float_type.__name__)

    @property
    def label(self) -> str:
        """Path of the output's quantizer in the prepared model, for messages; empty where there is none."""
        return "" if self.output_quantizer is None else self.output_quantizer.label

    def connect(
        self,
        sources: tuple[FakeQuantize, ...] | None,
        owned: tuple[int, ...] = (),
        requantized: tuple[int, ...] = (),
    ) -> None:
        """Say which quantizer produced each input.

        Args:
            sources: One quantizer per input; None forgets the links.
            owned: Positions whose input arrives in float: their quantizer is applied here and becomes a submodule.
            requantized: The same of inputs that arrive on other grids.
        """
        self._sources, self._requantized = sources, requantized
        here = sorted((*owned, *requantized))
        self.input_quantizers = nn.ModuleDict({str(i): sources[i] for i in here} if sources else {})
        self.input_quantizers.training = self.training

    @property
    def sources(self) -> tuple[FakeQuantize, ...] | None:
        """The quantizer of each input; None before links are known."""
        return self._sources

    def __repr__(self) -> str:
        # Most modules quantize no input themselves: that is not worth a line each.
        return super().__repr__().replace("\n  (input_quantizers): ModuleDict()", "")

    @contextlib.contextmanager
    def recording(self) -> Any:
        """While links are recorded: inputs are taken as they come."""
        before, self._sources = self._sources, ()
        try:
            yield
        finally:
            self._sources = before

    def quantized_inputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The inputs on their grids; as they come where activations stay float.

        Raises:
            LinkError: this module was not reached when links were recorded, or not from this quantizer.
        """
        own, sources = self.input_quantizers._modules, self._sources
        if len(inputs) == 1 and sources and not own and producer_of(inputs[0]) is sources[0]:
            return list(inputs)  # the usual case: of what follows, nothing would be found
        if self.output_quantizer is None:
            return list(inputs)
        if sources is None:
            raise LinkError(
                f"{type(self).__name__} that puts out to {self.label or '(an unprepared module)'} "
                "does not know the quantizer of its input: no recorded forward reached it. Give prepare_qat one "
                "example per path, example_inputs=[(x, True), (x, False)]"
            )
        for index, x in enumerate(inputs[: len(sources)]):
            producer = producer_of(x)
            if producer is not None and producer is not sources[index] and index not in self._requantized:
                raise LinkError(
                    f"input {index} of the {type(self).__name__} that puts out to {self.label} comes "
                    f"from {getattr(producer, 'label', producer)}, which no recorded forward showed; the recorded one "
                    f"is {sources[index].label}. Give prepare_qat one example per path of control flow, "
                    "example_inputs=[(x, True), (x, False)], so that both become one"
                )
        if not own:
            return list(inputs)
        return [own[str(i)](x) if str(i) in own else x for i, x in enumerate(inputs)]

    def _check_source(self, index: int) -> FakeQuantize:
        if self._sources is None or len(self._sources) <= index:
            raise LinkError(
                f"{self.label or type(self).__name__}: input {index} has no link; run prepare_qat "
                "with example_inputs that reach this module"
            )
        return self._sources[index]

    def input_qparams(self, index: int = 0) -> QParams:
        """Grid of an input as it is deployed.

        Raises:
            LinkError: links are not known.
            NumericsError: the quantizer has seen no data, or its scale is not usable.
        """
        return self._check_source(index).deployed_qparams()

    def one_function(self, y: Tensor, *step: Any) -> Tensor | None:
        """BatchNorm, activation and quantizer as one function, by the path that is chosen; None where there is none.

        Args:
            y: As `fused_epilogue` takes it.
            step: The rest of what it takes.
        """
        if torch.compiler.is_compiling():  # noting the path would make the second call compile again
            return None
        fast = generated_epilogue(y, *step) if self.fast_path and self.training else None
        found = fused_epilogue(y, *step) if fast is None else fast[0]
        if self.training:
            self.note_path(fast[1] if fast is not None else "steps" if found is None else "fused")
        return found

    def note_path(self, path: str) -> None:
        """Note which code a forward in training took."""
        if path != self.path:
            self.path = path


class QatOp(QatModule):
    """QAT form of an operation without parameters: quantizes its output.

    Attributes:
        owns_output: Whether no backward needs what the operation puts out, so that it is quantized where it lies.
    """

    owns_output: ClassVar[bool] = False

    def __init__(self, *args: Any, qconfig: QConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(qconfig)

    def deployed_float(self) -> nn.Module:
        """The float module that the deployed program computes between the grids; here that of `to_float`."""
        return self.to_float()

    def forward(self, *inputs: Any) -> Tensor:
        """The float operation on inputs that lie on their grids, put on the output's grid.

        Numbers, sizes and tensors of integers are handed on; with these alone, nothing is quantized.
        """
        tensors = self.data_tensors(inputs)
        if not tensors:
            plain: Tensor = self.float_type.forward(self, *inputs)
            return plain
        return self.quantized_output(*replaced(inputs, tensors, self.quantized_inputs(tensors)))

    def quantized_output(self, *inputs: Any) -> Tensor:
        """The float operation, put on the output's grid."""
        y: Tensor = self.float_type.forward(self, *inputs)
        found = self.where_it_lies(y) if self.owns_output else None
        return epilogue(y, self.output_quantizer) if found is None else found

    def where_it_lies(self, y: Tensor, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Tensor | None:
        """The output of the operation, clamped and put on the output's grid in place; None where that cannot be done.

        Args:
            y: What no backward needs.
            bounds: Of the clamp.
        """
        if torch.compiler.is_compiling():
            return compiled_clip(self, y, bounds)
        if self.fast_path and self.training and at_hand(y, DEVICES):
            clip = prepared(self, functools.partial(_clip_of, bounds=bounds, device=y.device.type), _quantizing)
            found = None if clip is None else clip(y)
            if clip is not None and found is not None:
                self.note_path(clip.path)
                return found
        return self.one_function(y, None, bounds, self.output_quantizer)

    def clip_rule(self, low: float, high: float, *switches: bool) -> Grid | None:
        """What C++ needs to know of the quantizer to serve it in a model that is compiled; None where it does not.

        Answered while a model is traced, like `QatLayer.serving_rule`.

        Args:
            low: Lower bound of the clamp before it.
            high: Upper bound.
            switches: What else the answer hangs on: compiled code is guarded by them.
        """
        return clip_rule_of(self, (low, high))

    clip_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _clip_of(op: QatOp, bounds: tuple[float, float], device: str) -> Clip | None:
    return clip_of(bounds, op.output_quantizer, device, op.low_memory)


def _quantizing(op: QatOp) -> tuple[nn.Module | None, ...]:
    quantizer = op.output_quantizer
    return () if quantizer is None else (quantizer, quantizer.observer)


def replaced(inputs: Iterable[Any], tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Any]:
    """`inputs` one by one, with each of `tensors` exchanged for that of `others` at its place."""
    queue = list(zip(tensors, others, strict=True))
    return [queue.pop(0)[1] if queue and value is queue[0][0] else value for value in spread(inputs)]


# Attributes of a QAT module that its float form does not have.
# (`bn` and its like are plain attributes where they are None).
_OWN_STATE = frozenset(
    {
        *("qconfig", "_sources", "_requantized", "linear_type"),
        *("bn", "bn_frozen", "low_memory", "fast_path", "path", "activation_module", "pre_activation_quantizer"),
    }
)


def adopt_state(target: nn.Module, source: nn.Module) -> None:
    """Give `target` the configuration, parameters and buffers of `source` (shared, not copied), but not its submodules.

    A layer's class and its QAT form differ in class only, so this replaces a constructor call per kind of layer.
    """
    kept = {name: value for name, value in own_attributes(source).items() if name not in _OWN_STATE}
    target.__dict__.update(kept)
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
