"""Observers: one file per idea, one base, and the names that `get_qconfig` takes."""

from __future__ import annotations

from qbench.observers.base import LatestObserver, Observer
from qbench.observers.fixed import FixedGridObserver, FixedObserver, FixedRangeObserver
from qbench.observers.histogram import HistogramObserver, PercentileObserver
from qbench.observers.kl import KLObserver
from qbench.observers.magnitude import (
    LatestMagnitudeObserver,
    LatestMeanMagnitudeObserver,
    MagnitudeObserver,
    MeanMagnitudeObserver,
)
from qbench.observers.min_max import LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver
from qbench.observers.mse import LatestMSEObserver, MSEObserver
from qbench.observers.names import OBSERVERS, find_observer
from qbench.observers.power_of_two import LatestPowerOfTwoObserver, PowerOfTwoObserver
from qbench.observers.quantile import LatestQuantileObserver, QuantileObserver

__all__ = [
    "OBSERVERS",
    "FixedGridObserver",
    "FixedObserver",
    "FixedRangeObserver",
    "HistogramObserver",
    "KLObserver",
    "LatestMSEObserver",
    "LatestMagnitudeObserver",
    "LatestMeanMagnitudeObserver",
    "LatestMinMaxObserver",
    "LatestObserver",
    "LatestPowerOfTwoObserver",
    "LatestQuantileObserver",
    "MSEObserver",
    "MagnitudeObserver",
    "MeanMagnitudeObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PercentileObserver",
    "PowerOfTwoObserver",
    "QuantileObserver",
    "find_observer",
]
