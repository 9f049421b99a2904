"""The names that `get_qconfig(method=...)` takes: what each paper does with activations and with weights."""

from __future__ import annotations

import dataclasses

from qbench.errors import ConfigError
from qbench.fake_quantize.base import FakeQuantize
from qbench.fake_quantize.dorefa import DoReFaActivation, DoReFaWeight
from qbench.fake_quantize.dsq import DSQ
from qbench.fake_quantize.lsq import LSQ
from qbench.fake_quantize.lsq_plus import LSQPlus
from qbench.fake_quantize.pact import PACT
from qbench.fake_quantize.tqt import TQT
from qbench.observers import (
    LatestMeanMagnitudeObserver,
    LatestMinMaxObserver,
    MagnitudeObserver,
    MeanMagnitudeObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to quantize.

    Attributes:
        name: What users write.
        activation: Quantizer of activations.
        weight: Quantizer of weights, where the method has none for them that of the method that its paper uses.
        activation_observer: Finds the range of activations, or where learning starts.
        weight_observer: The same for weights.
        own_weight: Whether it says something of weights itself.
    """

    name: str
    activation: type[FakeQuantize] = FakeQuantize
    weight: type[FakeQuantize] = FakeQuantize
    activation_observer: type[Observer] = MovingAverageMinMaxObserver
    weight_observer: type[Observer] = LatestMinMaxObserver
    own_weight: bool = True


# Add a method here.
METHODS: tuple[Method, ...] = (
    Method("fixed"),
    Method("lsq", LSQ, LSQ, MeanMagnitudeObserver, LatestMeanMagnitudeObserver),
    Method("lsq_plus", LSQPlus, LSQ, MinMaxObserver, LatestMeanMagnitudeObserver, own_weight=False),
    Method("pact", PACT, DoReFaWeight, MagnitudeObserver, own_weight=False),
    Method("dorefa", DoReFaActivation, DoReFaWeight, MagnitudeObserver),
    Method("dsq", DSQ, DSQ, MinMaxObserver),
    Method("tqt", TQT, TQT, MagnitudeObserver),
)


def find_method(name: str | type[FakeQuantize]) -> Method:
    """The method of this name, or one around a quantizer class.

    Args:
        name: One of `METHODS` by name, or a class for both roles; its observers are those of the method that has it.

    Raises:
        ConfigError: there is none of this name; the message lists the names.
    """
    if isinstance(name, type) and issubclass(name, FakeQuantize):
        known = next((method for method in METHODS if name in (method.activation, method.weight)), METHODS[0])
        return dataclasses.replace(known, name=name.__name__, activation=name, weight=name, own_weight=True)
    for method in METHODS:
        if method.name == name:
            return method
    raise ConfigError(
        f"no method is called {name!r}; expected one of {', '.join(method.name for method in METHODS)}, or a "
        "FakeQuantize class"
    )


def find_method_of(name: str | type[FakeQuantize], role: str) -> Method:
    """The method of this name, which must have a quantizer of its own for activations or weights.

    Raises:
        ConfigError: there is none of this name, or it is for the other role; the message lists those that work.
    """
    found = find_method(name)
    if not _has_own(found, role):
        check_role(found.activation, role)
    return found


def check_role(kind: type[FakeQuantize], role: str) -> None:
    """Raise ConfigError where a quantizer cannot quantize activations or weights; the message says which can."""
    if role in kind.roles:
        return
    listed = ", ".join(repr(method.name) for method in METHODS if _has_own(method, role))
    raise ConfigError(f"{kind.__name__} quantizes {kind.roles[0]}s, not {role}s; {role}_method is one of {listed}")


def _has_own(method: Method, role: str) -> bool:
    return role == "activation" or method.own_weight
