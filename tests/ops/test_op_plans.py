"""What is remembered of a weight: never longer than the weight, never after it changed; and traced programs."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from reference import different, random_codes
from torch import Tensor, nn

from qbench.numerics.arithmetic import Grid
from qbench.ops import conv, plans
from qbench.ops.geometry import Geometry

GRID, GEOMETRY = Grid(0.1, 3, -128, 127), Geometry((1, 1), (1, 1), (1, 1))


def sums(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return conv.exact_sum(x, GRID, w, conv.plan_of(w, bias, GRID, GEOMETRY), GEOMETRY)


def expected(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    added = None if bias is None else bias.double()
    return nn.functional.conv2d(x.double() - 3, w.double(), added, 1, 1)


@pytest.mark.parametrize("change", ["weight", "bias", "another bias", "no bias"])
def test_a_written_weight_is_planned_again(change: str) -> None:
    x, w, bias = random_codes(1, 3, 5, 5), random_codes(4, 3, 3, 3), torch.zeros(4, dtype=torch.int32)
    assert different(sums(x, w, bias), expected(x, w, bias).numpy()) == 0
    if change == "weight":
        w[0] = -w[0].clamp(min=-127)
    elif change == "bias":
        bias += 17
    else:
        bias = None if change == "no bias" else torch.full((4,), 5, dtype=torch.int32)  # type: ignore[assignment]
    assert different(sums(x, w, bias), expected(x, w, bias).numpy()) == 0


def test_a_plan_is_remembered_while_its_weight_lives() -> None:
    gc.collect()
    before = len(plans._ENTRIES)
    w, bias = random_codes(4, 3, 3, 3), torch.zeros(4, dtype=torch.int32)
    assert conv.plan_of(w, bias, GRID, GEOMETRY) is conv.plan_of(w, bias, GRID, GEOMETRY)
    assert len(plans._ENTRIES) == before + 1
    del w
    gc.collect()
    assert len(plans._ENTRIES) == before


def test_forms_of_many_shapes_and_grids_do_not_pile_up() -> None:
    w = random_codes(4, 3, 3, 3)
    for size in range(3, 15):
        x = random_codes(1, 3, size, size)
        assert different(sums(x, w, None), expected(x, w, None).numpy()) == 0
    assert len(conv.plan_of(w, None, GRID, GEOMETRY).forms) <= plans._MOST + 1
    for zero_point in range(20):
        conv.plan_of(w, None, GRID._replace(zero_point=zero_point), GEOMETRY)
    assert len(plans._ENTRIES[w]) <= plans._MOST


class Net(nn.Module):
    """One operator of each family in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", random_codes(4, 3, 3, 3))
        self.register_buffer("scales", torch.rand(4) / 100)
        self.register_buffer("table", random_codes(256))
        self.register_buffer("head", random_codes(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        ops, out = torch.ops.qbench, (0.1, -128, -128, 127, torch.int8, "onnxruntime")
        x = ops.quantize_q8to(x, *out)
        x = ops.conv2d_q8ta_q8csw_q8to(x, 0.1, -128, self.weight, self.scales, None, [2, 2], [1, 1], [1, 1], 1, *out)
        x = ops.max_pool2d_q8ta(x, [3], [2], [1], [1], False)
        x = ops.unary_q8ta_q8to(ops.add_q8ta_q8ta_q8to(x, 0.1, -128, x, 0.1, -128, *out), self.table)
        x = ops.cat_q8ta_q8to([x, x], [0.1, 0.1], [-128, -128], 2, *out)
        x = ops.global_avg_pool_q8ta_q8to(x, 0.1, -128, [2, 3], False, *out)
        return ops.linear_q8ta_q8csw_q8to(x, 0.1, -128, self.head, self.scales[:1], None, *out)


def test_a_program_has_a_dynamic_batch_and_survives_its_file() -> None:
    net, x = Net(), torch.rand(2, 3, 12, 10) * 20
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 2, 7):
        x = torch.rand(batch, 3, 12, 10) * 20
        codes = net(x)
        assert codes.shape == (batch, 5) and len(codes.unique()) > 1
        assert different(program.module()(x), codes.numpy()) == 0
        assert different(loaded(x), codes.numpy()) == 0
