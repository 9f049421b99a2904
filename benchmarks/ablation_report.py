"""From the cells of the ablation to figures and tables: means, spreads, paired differences and how sure they are.

    d_i   = aware_i − blind_i             for every seed i: same float start, same images, same order
    p     = share of the 2^n sign patterns ε for which |Σ ε_i·d_i| ≥ |Σ d_i|
    Holm    p_(j)·(m − j + 1) of the m sorted p-values, made non-decreasing and cut at 1

If awareness made no difference, the sign of each d_i would be a coin's: p is two-sided, exact, and assumes no
distribution. Holm's correction is over the m conditions of a table, because of many tests some are small by chance. A
spread is the standard deviation over the seeds, with n − 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MOST_SEEDS = 20  # 2^20 sign patterns are counted one by one
CONDITION = ("net", "bits", "bias")
MEASURES = ("top1", "loss")


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (n − 1)."""
    return {"mean": round(float(np.mean(values)), 8), "sd": round(float(np.std(values, ddof=1)), 8)}


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of "the signs are a coin's", exact; 1 where nothing differs."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    # Equal sums that were added up in another order must count as equal.
    return float(np.mean(np.abs(sums) >= np.abs(np.sum(differences)) - 1e-12))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests after Holm's correction, in the order given."""
    order, count = np.argsort(p_values, kind="stable"), len(p_values)
    adjusted, reached = [0.0] * count, 0.0
    for rank, index in enumerate(order):
        reached = max(reached, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = reached
    return adjusted


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a condition (net, bits, bias) that has at least two seeds trained both ways.

    Args:
        rows: Cells, as `benchmarks/ablation.py` writes them.
    """
    found: dict[tuple[Any, ...], dict[bool, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        kinds = found.setdefault(tuple(row[key] for key in CONDITION), {True: {}, False: {}})
        kinds[row["aware"]][row["seed"]] = row
    conditions = []
    for key, kinds in found.items():
        seeds = sorted(set(kinds[True]) & set(kinds[False]))
        if len(seeds) > 1:
            aware, blind = ([kinds[kind][seed] for seed in seeds] for kind in (True, False))
            conditions.append({**dict(zip(CONDITION, key, strict=True)), "seeds": seeds, **_figures(aware, blind)})
    for measure in MEASURES:
        adjusted = holm([condition["paired"][measure]["p"] for condition in conditions])
        for condition, p in zip(conditions, adjusted, strict=True):
            condition["paired"][measure]["p_holm"] = p
    return conditions


def _figures(aware: list[dict[str, Any]], blind: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is said of a condition; the seeds of both lists agree."""
    paired = {}
    for measure in MEASURES:
        differences = [a["deployed"][measure] - b["deployed"][measure] for a, b in zip(aware, blind, strict=True)]
        paired[measure] = {**mean_and_spread(differences), "p": sign_flip_p(differences), "each": _short(differences)}
    float_scores = {measure: mean_and_spread([row["float"][measure] for row in aware]) for measure in MEASURES}
    return {"float": float_scores, "aware": _kind(aware), "blind": _kind(blind), "paired": paired}


def _kind(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads of one way of training, over its seeds."""
    figures: dict[str, Any] = {
        form: {measure: mean_and_spread([row[form][measure] for row in rows]) for measure in MEASURES}
        for form in ("view", "deployed")
    }
    for measure in MEASURES:
        costs = [row["deployed"][measure] - row["view"][measure] for row in rows]
        figures.setdefault("deployment", {})[measure] = {**mean_and_spread(costs), "p": sign_flip_p(costs)}
    figures["changed"] = mean_and_spread([row["changed"] / row["codes"] for row in rows])
    figures["output_changed"] = mean_and_spread([row["output_changed"] / row["output_codes"] for row in rows])
    figures["bias_error"] = mean_and_spread([row["bias_error"] for row in rows])
    figures["eval_vs_program"] = sum(row["eval_vs_program"] for row in rows)
    ran = [row for row in rows if "onnxruntime" in row]
    if ran:
        figures["onnxruntime"] = {
            "seeds": len(ran),
            "codes": sum(row["output_codes"] for row in ran),
            "changed": sum(row["onnxruntime"]["changed"] for row in ran),
            "top1": float(np.mean([row["onnxruntime"]["top1"] for row in ran])),
            "program_top1": float(np.mean([row["deployed"]["top1"] for row in ran])),
        }
    return figures


def _short(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]


def tables(conditions: list[dict[str, Any]]) -> str:
    """The Markdown tables of docs/ablation.md, each ending in a newline, with an empty line between them."""
    return "\n".join(draw(conditions) for draw in TABLES)


def codes_table(conditions: list[dict[str, Any]]) -> str:
    """What deployment changes of what training saw, in percent of codes."""
    rows = [
        [
            *_names(one),
            _number(one["blind"]["bias_error"], 4),
            *(
                _number(one[kind][what], 3, 100) if one[kind][what]["mean"] else "0"
                for kind in ("aware", "blind")
                for what in ("changed", "output_changed")
            ),
        ]
        for one in conditions
    ]
    head = ["bias error, steps", "aware: all codes, %", "aware: outputs, %", "blind: all codes, %", "blind: outputs, %"]
    return _markdown([*_HEAD, *head], rows)


def top1_table(conditions: list[dict[str, Any]]) -> str:
    """Top-1 in percent: float, as training saw it, deployed, and the paired difference."""
    return _score_table(conditions, "top1", 2, 100)


def loss_table(conditions: list[dict[str, Any]]) -> str:
    """Cross entropy in thousandths of a nat, in the same columns."""
    return _score_table(conditions, "loss", 1, 1000)


def cost_table(conditions: list[dict[str, Any]]) -> str:
    """Deployed minus in training, of the blind: what the bias error costs a model that did not see it."""
    rows = []
    for one in conditions:
        cost = one["blind"]["deployment"]
        cells = [
            cell
            for measure, digits, factor in (("top1", 3, 100), ("loss", 2, 1000))
            for cell in (_number(cost[measure], digits, factor, sign="+"), _p(cost[measure]["p"]))
        ]
        rows.append([*_names(one), *cells])
    return _markdown([*_HEAD, "top-1, points", "p", "loss, nats/1000", "p"], rows)


def onnx_table(conditions: list[dict[str, Any]]) -> str:
    """The ONNX file in its runtime against the program; empty where no file was run."""
    rows = []
    for one in conditions:
        for kind in ("aware", "blind"):
            ran = one[kind].get("onnxruntime")
            if ran:
                top1 = [f"{100 * ran[key]:.2f}" for key in ("program_top1", "top1")]
                share = f"{100 * ran['changed'] / ran['codes']:.3f}"
                rows.append([*_names(one), kind, *top1, f"{ran['changed']} of {ran['codes']}", share])
    head = ["trained", "program, top-1 %", "ONNX Runtime, top-1 %", "codes that differ", "%"]
    return _markdown([*_HEAD, *head], rows)


TABLES = (codes_table, top1_table, loss_table, cost_table, onnx_table)
_HEAD = ("net", "grid", "bias")


def _score_table(conditions: list[dict[str, Any]], measure: str, digits: int, factor: float) -> str:
    rows = []
    for one in conditions:
        forms = [one["aware"]["view"], one["blind"]["view"], one["aware"]["deployed"], one["blind"]["deployed"]]
        paired = one["paired"][measure]
        scores = [_number(form[measure], digits, factor) for form in (one["float"], *forms)]
        difference = _number(paired, digits + 1, factor, sign="+")
        rows.append([*_names(one), *scores, difference, _p(paired["p"]), _p(paired["p_holm"])])
    head = ["float", "aware in training", "blind in training", "aware deployed", "blind deployed"]
    return _markdown([*_HEAD, *head, "aware − blind", "p", "p (Holm)"], rows)


def _names(condition: dict[str, Any]) -> list[str]:
    return [condition["net"], f"W{condition['bits']}A{condition['bits']}", condition["bias"]]


def _number(figure: dict[str, float], digits: int, factor: float = 1.0, sign: str = "") -> str:
    return f"{factor * figure['mean']:{sign}.{digits}f} ± {factor * figure['sd']:.{digits}f}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _markdown(head: Sequence[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    rule = ["---"] * 3 + ["--:"] * (len(head) - 3)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))
