"""The names that `get_qconfig(observer=..., weight_observer=...)` takes."""

from __future__ import annotations

from qbench.errors import ConfigError
from qbench.observers.base import Observer
from qbench.observers.histogram import PercentileObserver
from qbench.observers.kl import KLObserver
from qbench.observers.magnitude import (
    LatestMagnitudeObserver,
    LatestMeanMagnitudeObserver,
    MagnitudeObserver,
    MeanMagnitudeObserver,
)
from qbench.observers.min_max import LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver
from qbench.observers.mse import LatestMSEObserver, MSEObserver
from qbench.observers.power_of_two import LatestPowerOfTwoObserver, PowerOfTwoObserver
from qbench.observers.quantile import LatestQuantileObserver, QuantileObserver

# Name → what watches activations, and what finds the range of the weight at hand (None where that makes no sense).
OBSERVERS: dict[str, tuple[type[Observer], type[Observer] | None]] = {
    "moving_average": (MovingAverageMinMaxObserver, None),
    "min_max": (MinMaxObserver, LatestMinMaxObserver),
    "magnitude": (MagnitudeObserver, LatestMagnitudeObserver),
    "mean_magnitude": (MeanMagnitudeObserver, LatestMeanMagnitudeObserver),
    "quantile": (QuantileObserver, LatestQuantileObserver),
    "mse": (MSEObserver, LatestMSEObserver),
    "percentile": (PercentileObserver, None),
    "kl": (KLObserver, None),
    "power_of_two": (PowerOfTwoObserver, LatestPowerOfTwoObserver),
}


def find_observer(name: str | type[Observer], role: str) -> type[Observer]:
    """The observer of this name for activations or weights (a class is returned as it is).

    Args:
        name: One of `OBSERVERS`, or a class.
        role: `"activation"` or `"weight"`.

    Raises:
        ConfigError: there is none of this name for this role; the message lists the names.
    """
    if isinstance(name, type) and issubclass(name, Observer):
        return name
    place = 0 if role == "activation" else 1
    found = OBSERVERS[name][place] if isinstance(name, str) and name in OBSERVERS else None
    if found is None:
        known = ", ".join(key for key, kinds in OBSERVERS.items() if kinds[place] is not None)
        raise ConfigError(f"no observer of {role}s is called {name!r}; expected one of {known}, or an Observer class")
    return found
