"""Calibration: every quantizer ends with a grid, and nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import ConfigError, NumericsError, PreparationError
from qbench.fake_quantize import FakeQuantize
from qbench.ptq.calibration import check_calibrated
from tests.models import SmallNet, assert_exact, images, randomise_statistics

BATCHES = [images(seed=1), (images(seed=2),), images(seed=3)]
METHODS: dict[str, dict[str, object]] = {
    "fixed": {},
    **{name: {"method": name} for name in ("lsq", "lsq_plus", "pact", "dorefa", "dsq", "tqt")},
    **{f"observer {name}": {"observer": name} for name in ("mse", "quantile", "percentile", "kl", "power_of_two")},
}


def prepared(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = randomise_statistics(SmallNet()).train()
    qconfig = qbench.get_qconfig(**options)  # type: ignore[arg-type]
    return qbench.prepare_qat(qbench.fuse(model), qconfig=qconfig, example_inputs=(images(),))


def kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and statistics of the model, copied; quantizers' own left out."""
    return {k: v.clone() for k, v in model.state_dict().items() if "quantizer" not in k}


@pytest.mark.parametrize("name", METHODS)
def test_every_quantizer_has_a_grid_and_nothing_else_moves(name: str) -> None:
    model = prepared(**METHODS[name])
    modes, before = [m.training for m in model.modules()], kept(model)
    report = qbench.ptq.calibrate(model, BATCHES)
    assert report.batches == 3
    assert (report.held, report.unreached, report.without_grid) == ((), (), ())
    quantizers = {k: m for k, m in model.named_modules() if isinstance(m, FakeQuantize) and not m.stateless}
    assert set(report.observed) == set(quantizers)
    assert all(q.seen_data and q.fake_quant_enabled and not q._forward_pre_hooks for q in quantizers.values())
    assert [m.training for m in model.modules()] == modes
    assert {k: torch.equal(v, before[k]) for k, v in kept(model).items()} == dict.fromkeys(before, True)
    if name in ("fixed", "lsq_plus", "dorefa"):
        assert_exact(model.eval(), qbench.convert(model, (images(),)), images())


def test_ranges_are_those_of_the_float_model_in_any_order() -> None:
    model = prepared(observer="min_max")
    seen: list[Tensor] = []
    model.conv1.register_forward_hook(lambda *call: seen.append(call[2]))
    other = copy.deepcopy(model)
    qbench.ptq.calibrate(model, BATCHES)
    qbench.ptq.calibrate(other, BATCHES[::-1])
    ours, theirs = (dict(m.named_buffers()) for m in (model, other))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    everything = torch.cat(seen[:3])
    observer = model.conv1.output_quantizer.observer
    assert (observer.min_val, observer.max_val) == torch.aminmax(everything)


def test_what_is_disabled_or_trained_keeps_its_grid() -> None:
    model = prepared(method="lsq")
    qbench.ptq.calibrate(model, BATCHES[:1])
    model.conv1.output_quantizer.change.data.fill_(0.25)
    model.conv2.apply(qbench.disable_observer)
    before = {name: q.scale.clone() for name, q in model.named_modules() if isinstance(q, FakeQuantize)}
    report = qbench.ptq.calibrate(model, [images(seed=9) * 3])
    assert set(report.held) == {"conv1.output_quantizer", "conv2.output_quantizer", "conv2.weight_quantizer"}
    assert "conv1.output_quantizer: keeps its grid" in str(report)
    moved = {n for n, q in model.named_modules() if isinstance(q, FakeQuantize) and not torch.equal(q.scale, before[n])}
    assert moved == set(report.observed) - {n for n in report.observed if n.endswith("weight_quantizer")}


class TwoWays(nn.Module):
    """Two convolutions; one call takes one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, first: bool = True) -> Tensor:
        return self.one(x) if first else self.two(x)


def test_what_no_batch_reaches_is_named() -> None:
    qconfig, x = qbench.get_qconfig(), images()
    model = qbench.prepare_qat(TwoWays(), qconfig=qconfig, example_inputs=[(x, True), (x, False)])
    report = qbench.ptq.calibrate(model, [(x, True)])
    assert report.unreached == report.without_grid == ("two.input_quantizers.0", "two.output_quantizer")
    with pytest.raises(NumericsError, match=r"the first is two\.input_quantizers\.0.*calibrate"):
        check_calibrated(model, "here")
    again = qbench.ptq.calibrate(model, [(x, False)])
    assert (again.unreached, again.without_grid) == (("one.input_quantizers.0", "one.output_quantizer"), ())
    check_calibrated(model, "here")


@pytest.mark.parametrize(
    ("batches", "said"),
    [([], "no batch"), (images(), r"calibrate\(model, \[x\]\)"), ([[images(), 1]], "leaves out the labels")],
)
def test_wrong_batches(batches: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        qbench.ptq.calibrate(prepared(), batches)  # type: ignore[arg-type]


def test_models_without_links_are_refused_and_modes_are_put_back_after_an_error() -> None:
    with pytest.raises(PreparationError, match="prepare_qat"):
        qbench.ptq.calibrate(SmallNet(), [images()])
    with pytest.raises(PreparationError, match="example_inputs"):
        qbench.ptq.calibrate(qbench.prepare_qat(TwoWays(), qconfig=qbench.get_qconfig()), [images()])
    model = prepared()
    with pytest.raises(RuntimeError):
        qbench.ptq.calibrate(model, [images(channels=5)])
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    assert all(m.training for m in model.modules())
    assert all(q.fake_quant_enabled and not q._forward_pre_hooks for q in quantizers)
