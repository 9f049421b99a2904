"""Small plots as inline SVG.

No text is drawn: labels and numbers stand beside the plots, in HTML, so that they wrap and keep their size however
narrow the page is. Each plot says in words what it shows, for those who do not see it. It is drawn in a box of `WIDTH`
by `HEIGHT` (or `TALL`) units, which is stretched to the space there is; colours are those of the classes `ink`, `soft`
and `axis` of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Limits = tuple[float, float]

WIDTH, HEIGHT, TALL = 100.0, 10.0, 36.0


def bar(value: float, largest: float, says: str, *, kind: str = "ink") -> str:
    """A horizontal bar of `value` on an axis from 0 to `largest`; what is beyond ends at the edge."""
    share = 0.0 if not largest > 0 or math.isnan(value) else min(max(value / largest, 0.0), 1.0)
    return _svg(says, HEIGHT, _rectangle("soft", 0, WIDTH, 3, 4) + _rectangle(kind, 0, share * WIDTH, 1, 8))


def interval(inner: Limits, outer: Limits | None, span: Limits, says: str) -> str:
    """A range on an axis over `span` with its zero marked; `outer` is a second range drawn pale behind it."""
    parts = []
    for kind, limits, top, height in (("soft", outer, 0.0, HEIGHT), ("ink", inner, 2.5, 5.0)):
        if limits is not None:
            low, high = (_place(limit, span) for limit in limits)
            parts.append(_rectangle(kind, low, max(high - low, 0.6), top, height))
    zero = _place(0.0, span)
    return _svg(says, HEIGHT, "".join(parts) + _rectangle("axis", min(zero, WIDTH - 0.5), 0.5, 0, HEIGHT))


def histogram(counts: Sequence[int], says: str, *, columns: int = 128) -> str:
    """Columns of `log(1 + count)`, neighbours put together where there are more than `columns`."""
    per = max(1, math.ceil(len(counts) / columns))
    sums = [sum(counts[i : i + per]) for i in range(0, len(counts), per)] or [0]
    top, width = math.log1p(max(sums)) or 1.0, WIDTH / len(sums)
    path = "".join(
        f"M{i * width:.2f} {TALL:g}v{-TALL * math.log1p(count) / top:.2f}h{width:.2f}V{TALL:g}z"
        for i, count in enumerate(sums)
        if count
    )
    return _svg(says, TALL, f'<path class="ink" d="{path}"/>' + _rectangle("axis", 0, WIDTH, TALL - 0.4, 0.4))


def _place(value: float, span: Limits) -> float:
    low, high = span
    return min(max((value - low) / (high - low), 0.0), 1.0) * WIDTH if high > low else 0.0


def _rectangle(kind: str, x: float, width: float, y: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}"/>'


def _svg(says: str, height: float, inside: str) -> str:
    size = "tall" if height == TALL else "flat"
    return (
        f'<svg class="{size}" role="img" aria-label="{escape(says)}" viewBox="0 0 {WIDTH:g} {height:g}" '
        f'preserveAspectRatio="none">{inside}</svg>'
    )
