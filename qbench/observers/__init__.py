"""Observers: one file per idea, one base."""

from qbench.observers.base import Observer
from qbench.observers.min_max import LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver

__all__ = ["LatestMinMaxObserver", "MinMaxObserver", "MovingAverageMinMaxObserver", "Observer"]
