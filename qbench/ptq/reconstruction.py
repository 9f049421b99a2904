"""Reconstruction: the rounding of weights is learned, block by block, so that outputs come near those in float.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv:2004.10568, section 3;
over a block of several layers, as in Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426; with activations that are in
float at random, as in QDrop: see `qbench.ptq.dropping`.

    E(V) = mean (y − y_float)²         y: output of the block on what the quantized model, earlier blocks done, gives it
    L(V) = E(V)/E₀ + λ·f(V)            y_float: its output in the float model;  E₀: E of rounding to nearest
    f(V) = mean(1 − |2·h(V) − 1|^β)    λ = 0 in the first fifth of the steps, then β falls from 20 to 2 (cosine)

The papers weigh a sum over weights with λ = 0.01 against E in the units of the activation. Here both terms are
relative: a weight's share is of the order of 1/N in either, so that one λ serves layers of all sizes.

Learned codes are baked into the weight, and then counted: see `qbench.ptq.rounding`. A block whose output is no nearer
than with rounding to nearest, or one of whose codes differs, keeps the weights that it had.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qbench.errors import ConfigError
from qbench.fake_quantize import FakeQuantize
from qbench.modes import evaluating
from qbench.nn.qat.layer import QatLayer
from qbench.preparation import quantized_modules
from qbench.ptq.calibration import Batches, as_tuples, check_calibrated, in_float
from qbench.ptq.chains import SkippedLayer
from qbench.ptq.dropping import dropping, mixed
from qbench.ptq.rounding import LearnedRounding, bake, regularizer
from qbench.report.text import bullets, columns

FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM_UP = 0.2


@dataclasses.dataclass(frozen=True)
class ReconstructedBlock:
    """A block and what learning its rounding did.

    Attributes:
        path: Of the block.
        layers: Paths of the layers in it whose rounding was learned.
        before: E with rounding to nearest.
        after: E with the learned codes, or `before` where they were not kept.
        flipped: How many codes are other than those of rounding to nearest.
        codes: Of how many.
        refused: Why the learned codes were not kept; empty where they were.
    """

    path: str
    layers: tuple[str, ...]
    before: float
    after: float
    flipped: int
    codes: int
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class ReconstructionReport:
    """What reconstruction did.

    Attributes:
        blocks: In the order of the forward.
        skipped: Layers whose rounding was not learned, and why.
        batches: How many batches were seen.
    """

    blocks: tuple[ReconstructedBlock, ...]
    skipped: tuple[SkippedLayer, ...]
    batches: int

    def __str__(self) -> str:
        rows = [("block", "mean squared error before", "after", "codes flipped")]
        for block in self.blocks:
            flipped = f"{block.flipped} of {block.codes}"
            rows.append((block.path or "(root)", f"{block.before:.3g}", f"{block.after:.3g}", flipped))
        notes = [f"{block.path or '(root)'}: {block.refused}" for block in self.blocks if block.refused]
        notes += [f"{skipped.path}: {skipped.reason}" for skipped in self.skipped]
        head = f"{len(self.blocks)} blocks reconstructed on {self.batches} batches"
        return "\n".join([head, *columns(rows, frozenset({1, 2, 3})), *bullets(notes)])


@dataclasses.dataclass(frozen=True)
class _Learning:
    steps: int
    rate: float
    weight: float
    drop: float


@dataclasses.dataclass(frozen=True)
class _Use:
    """One call of a block: what it was given, copied, and what it put out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Tensor


def reconstruct(
    prepared: nn.Module,
    batches: Batches,
    *,
    blocks: Sequence[str] | None = None,
    steps: int = 1000,
    rate: float = 1e-2,
    regularization: float = 1.0,
    drop: float = 0.0,
) -> ReconstructionReport:
    """Learn for each weight whether to round it up or down, block by block. The model's weights are changed in place.

    A layer whose weight has a scale that is kept (LSQ and the like) gets its weight's observer disabled, so that the
    grid of the learned codes holds until training moves it.

    Args:
        prepared: A prepared model whose quantizers have seen data (`qbench.ptq.calibrate`), in either mode.
        batches: Inputs, as for `calibrate`; they are kept until the end. A step takes one of them, in turn.
        blocks: Paths of modules, each of which is one block; None makes each layer one.
        steps: Steps of Adam for each block. The paper has 10 000.
        rate: Learning rate of `V`.
        regularization: `λ`.
        drop: Chance that a value of an activation is taken in float at a step; QDrop has 0.5.

    Returns:
        Each block's error before and after; `print` shows it.

    Raises:
        PreparationError: the model was not prepared, or its links are not recorded yet.
        NumericsError: a quantizer has seen no data.
        ConfigError: there is no batch, a block does not exist, holds no layer, lies in another or puts out no tensor,
            there is no step, or `drop` is no chance.
    """
    check_calibrated(prepared, "reconstruct")
    kept = list(as_tuples(batches, "reconstruct"))
    if not kept or steps < 1:
        raise ConfigError(f"reconstruct: {len(kept)} batches and steps={steps}; reconstruct(model, [x], steps=1000)")
    layers = {path: m for path, m in quantized_modules(prepared) if isinstance(m, QatLayer)}
    chosen = _blocks(prepared, layers, list(layers) if blocks is None else blocks)
    reasons = {path: _why_not(layer) for path, layer in layers.items()}
    done, reached = [], set()
    if not 0.0 <= drop <= 1.0:
        raise ConfigError(f"reconstruct: drop={drop!r} is no chance; drop=0.5 is that of QDrop, drop=0 drops nothing")
    learning = _Learning(steps, rate, regularization, drop)
    with evaluating(prepared):
        for path in _in_order(prepared, chosen, kept[0]):
            usable = {p: m for p, m in layers.items() if _is_in(p, path) and not reasons[p]}
            reached |= {p for p in layers if _is_in(p, path)}
            if usable:
                done.append(_reconstruct_block(prepared, path, usable, kept, learning))
    skipped = [
        SkippedLayer(path, reasons[path] or "it is in no block that the first batch reaches")
        for path in layers
        if reasons[path] or path not in reached
    ]
    return ReconstructionReport(tuple(done), tuple(skipped), len(kept))


def _reconstruct_block(
    model: nn.Module,
    path: str,
    layers: Mapping[str, QatLayer],
    batches: Sequence[tuple[Any, ...]],
    learning: _Learning,
) -> ReconstructedBlock:
    block = model.get_submodule(path)
    with in_float(model):
        exact = _uses(model, path, batches)
    wanted = [use.out for use in exact]
    uses = _uses(model, path, batches)
    before = _error(block, uses, wanted)
    nearest = {p: layer.quantized_parameters()[0].codes() for p, layer in layers.items()}
    count = sum(codes.numel() for codes in nearest.values())
    old = {p: layer.weight.detach().clone() for p, layer in layers.items()}
    steps = _learn(block, layers, uses, exact, before, learning) if before else {}
    different = sum(bake(layers[p], found) for p, found in steps.items())
    after = _error(block, uses, wanted)
    refused = _why_refused(different, before, after)
    if refused:
        for p, layer in layers.items():
            layer.weight.copy_(old[p])
        return ReconstructedBlock(path, tuple(layers), before, before, 0, count, refused)
    for layer in layers.values():
        if not layer.weight_quantizer.stateless:
            layer.weight_quantizer.observer_enabled = False
    now = {p: layer.quantized_parameters()[0].codes() for p, layer in layers.items()}
    flipped = sum(int((now[p] != nearest[p]).sum()) for p in layers)
    return ReconstructedBlock(path, tuple(layers), before, after, flipped, count)


def _learn(
    block: nn.Module,
    layers: Mapping[str, QatLayer],
    uses: Sequence[_Use],
    exact: Sequence[_Use],
    unit: float,
    learning: _Learning,
) -> dict[str, Tensor]:
    """`q − z` of each layer. The layers have their own quantizers again afterwards."""
    rounding = {path: LearnedRounding(layer) for path, layer in layers.items()}
    own = {path: layer.weight_quantizer for path, layer in layers.items()}
    variables = [stand_in.v for stand_in in rounding.values()]
    optimizer = torch.optim.Adam(variables, lr=learning.rate)
    try:
        for path, stand_in in rounding.items():
            layers[path].weight_quantizer = stand_in
        for step in range(learning.steps):
            use, other = uses[step % len(uses)], exact[step % len(uses)]
            args, kwargs = mixed((other.args, other.kwargs), (use.args, use.kwargs), learning.drop)
            with torch.enable_grad(), dropping(block, learning.drop):
                loss = (block(*args, **kwargs) - other.out).square().mean() / unit
                beta = _beta(step / learning.steps)
                if beta is not None:
                    loss = loss + learning.weight * torch.stack([regularizer(v, beta) for v in variables]).mean()
            # Not backward(): the model's own parameters shall get no gradient.
            for variable, gradient in zip(variables, torch.autograd.grad(loss, variables), strict=True):
                variable.grad = gradient
            optimizer.step()
    finally:
        for path, quantizer in own.items():
            layers[path].weight_quantizer = quantizer
    return {path: stand_in.learned_steps() for path, stand_in in rounding.items()}


def _beta(progress: float) -> float | None:
    """`β` after this share of the steps; None while rounding is free."""
    if progress < WARM_UP:
        return None
    share = (progress - WARM_UP) / (1.0 - WARM_UP)
    return LAST_BETA + 0.5 * (FIRST_BETA - LAST_BETA) * (1.0 + math.cos(math.pi * share))


def _why_refused(different: int, before: float, after: float) -> str:
    if different:
        return f"{different} codes moved with the grid when the weights were written, so the old weights are kept"
    if before and after > before:
        return f"learned rounding has an error of {after:.3g}, above that of rounding to nearest, which is kept"
    return ""


def _why_not(layer: QatLayer) -> str:
    """Why the rounding of a layer's weight cannot be learned; empty where it can."""
    quantizer = layer.weight_quantizer
    if layer.batch_norm is layer or layer.linear_weight is not layer.weight:
        return "its weight is computed from its parameters"
    if type(quantizer).shaped is not FakeQuantize.shaped:
        return f"{type(quantizer).__name__} quantizes a function of its weight"
    if quantizer.stateless and quantizer.observer.clips:
        return f"{type(quantizer.observer).__name__} searches the range in the weight, so it would move with the weight"
    return "" if quantizer.fake_quant_enabled else "its fake-quant is disabled"


def _uses(model: nn.Module, path: str, batches: Sequence[tuple[Any, ...]]) -> list[_Use]:
    """Every call of a block, with copies: what follows may write to a tensor."""
    found: list[_Use] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not isinstance(out, Tensor):
            raise ConfigError(
                f"reconstruct: block {path or '(root)'} puts out a {type(out).__name__}, expected a tensor; name the "
                "modules in it as blocks"
            )
        copied, named = tree_map_only(Tensor, torch.clone, (args, kwargs))
        found.append(_Use(copied, named, out.clone()))

    hook = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        for inputs in batches:
            model(*inputs)
    finally:
        hook.remove()
    return found


def _error(block: nn.Module, uses: Sequence[_Use], wanted: Sequence[Tensor]) -> float:
    """E over all calls."""
    total = sum(
        float((block(*use.args, **use.kwargs) - target).double().square().sum())
        for use, target in zip(uses, wanted, strict=True)
    )
    return total / sum(target.numel() for target in wanted)


def _in_order(model: nn.Module, blocks: Sequence[str], inputs: tuple[Any, ...]) -> list[str]:
    """The blocks that a forward reaches, in the order of their first call."""
    order: dict[str, None] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, __, path=path: order.setdefault(path))
        for path in blocks
    ]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _is_in(path: str, block: str) -> bool:
    return not block or path == block or path.startswith(f"{block}.")


def _blocks(model: nn.Module, layers: Mapping[str, QatLayer], wanted: Sequence[str]) -> list[str]:
    """The blocks, checked."""
    known = {name for name, _ in model.named_modules()}
    for path in wanted:
        if path not in known:
            near = get_close_matches(path, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"reconstruct: the model has no module {path!r}{hint}")
        if not any(_is_in(layer, path) for layer in layers):
            raise ConfigError(f"reconstruct: block {path!r} holds no QAT layer; layers are {', '.join([*layers][:5])}")
        around = next((other for other in wanted if other != path and _is_in(path, other)), None)
        if around is not None:
            raise ConfigError(f"reconstruct: block {path!r} lies in block {around!r}; name one of the two")
    return list(wanted)
