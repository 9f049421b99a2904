"""How a profile reads: its table to the letter, its orders, and the way through JSON."""

from __future__ import annotations

import dataclasses

import pytest

from qbench.errors import ConfigError
from qbench.report.profile import Cost, Row, TrainingProfile
from qbench.report.text import WIDTH

MIB = 2**20
PROFILE = TrainingProfile(
    model="Net",
    layers=(
        Row("stem", "ConvBnReLU2d", "ConvBnReLU2d", Cost(0.001, 0.002, 0, MIB), Cost(0.002, 0.0025, 0, 2 * MIB)),
        Row("pool", "MaxPool2d", "MaxPool2d", Cost(0.0005, 0.0005, 0, 0), Cost(0.0004, 0.0005, 0, MIB // 2)),
        Row("blocks.3.attention.output.dense", "Linear", "Linear", Cost(0.1, 0.1, 0, 0), Cost(0.12, 0.13, 0, 0)),
    ),
    outside=Row("outside layers", "", "", Cost(0.0001, 0.0001, 0, 0), Cost(0.0001, 0.0002, 0, 0)),
    optimizer=Row("optimizer", "", "", Cost(update=0.001), Cost(update=0.0012)),
    float_step=Cost(0.1, 0.1, 0.001, MIB),
    qat_step=Cost(0.12, 0.128, 0.001, 5 * MIB // 2),
    ratio=(1.2, 1.239, 1.3),
    rounds=5,
    settings={"inputs": "(8, 3, 64, 64)", "dtype": "float32", "device": "cpu", "threads": 2, "torch": "2.13.0"},
)

TABLE = """\
Net: inputs (8, 3, 64, 64), float32, cpu, 2 thread(s), medians of 5 rounds

                                       ms a step       QAT adds, ms   saved, MiB
layer                 kind          float    QAT  forward  backward  float   QAT
blocks..output.dense  Linear        200.0  250.0   +20.00    +30.00   0.00  0.00
stem                  ConvBnReLU2d   3.00   4.50    +1.00     +0.50   1.00  2.00
1 more layer                         1.00   0.90    -0.10     +0.00   0.00  0.50
outside layers                       0.20   0.30    +0.00     +0.10   0.00  0.00
optimizer                            1.00   1.20                      0.00  0.00
whole step                          205.2  256.9   +20.90    +30.60   1.00  2.50

a step that is not watched: 201.0 -> 249.0 ms, 1.24 x (quartiles 1.20 to 1.30)
  forward 100.0 -> 120.0, backward 100.0 -> 128.0, update 1.00 -> 1.00 ms
saved for backward: 1.00 -> 2.50 MiB (2.50 x)"""


def test_the_table() -> None:
    assert PROFILE.table(most=2) == TABLE
    assert max(map(len, TABLE.splitlines())) <= WIDTH


def test_orders_and_how_many() -> None:
    assert [row.path for row in PROFILE.ordered("model")] == ["stem", "pool", "blocks.3.attention.output.dense"]
    assert [row.path for row in PROFILE.ordered()] == ["blocks.3.attention.output.dense", "stem", "pool"]
    assert str(PROFILE) == PROFILE.table() and "more layers" not in str(PROFILE)
    assert PROFILE.table("model", None).index("stem") < PROFILE.table("model", None).index("pool")
    assert "3 more layers" in PROFILE.table(most=0)
    with pytest.raises(ConfigError, match="order='size': expected one of overhead, model"):
        PROFILE.table("size")
    with pytest.raises(ConfigError, match="most=-1: expected a number of layers from 0 on"):
        PROFILE.table(most=-1)


def test_every_row_is_in_the_total() -> None:
    total = PROFILE.total
    assert dataclasses.astuple(total.in_float) == pytest.approx((0.1016, 0.1026, 0.001, MIB))
    assert total.overhead == pytest.approx(sum(row.overhead for row in PROFILE.rows))
    assert Cost.total([]) == Cost()


def test_a_profile_of_one_round_that_saves_nothing() -> None:
    nothing = dataclasses.replace(PROFILE, float_step=Cost(0.1, 0.1), rounds=1, settings={})
    assert str(nothing).startswith("Net: one round\n")
    assert str(nothing).endswith("saved for backward: 0.00 -> 2.50 MiB")


def test_json_is_read_back() -> None:
    assert TrainingProfile.from_json(PROFILE.to_json()) == PROFILE
