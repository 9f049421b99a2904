"""Whole models with every quantizer: copies, state, sharing, devices, compilation, DDP, and that a step learns."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Branchy, Calls, SmallNet, TwoHeads, assert_exact, evaluate, images, leaves, train
from torch import Tensor, nn

import qbench
from qbench.errors import LinkError, NumericsError
from qbench.fake_quantize import METHODS, FakeQuantize, LearnedFakeQuantize

NAMES = tuple(method.name for method in METHODS)
LEARNED = ("lsq", "lsq_plus", "pact", "dsq", "tqt")
every = pytest.mark.parametrize("method", NAMES)
learned = pytest.mark.parametrize("method", LEARNED)
# What exports a model takes seconds: every method has its turn with the slow tests.
some = pytest.mark.parametrize("method", [*(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[2:]), "lsq"])


def prepared(method: str, model: type[nn.Module] = SmallNet, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    config = qbench.get_qconfig(method=method, weight_bits=4, activation_bits=4, **options)
    return qbench.prepare_qat(qbench.fuse(model()), qconfig=config, example_inputs=(images(),))


def trained(method: str, steps: int = 3, **options: object) -> nn.Module:
    model = prepared(method, **options)  # type: ignore[arg-type]
    for seed in range(steps):
        step(model, images(8, seed=seed))
    return model


def step(model: nn.Module, x: Tensor, rate: float = 0.05) -> None:
    model.train()
    model.zero_grad()
    sum(out.square().mean() for out in leaves(model(x))).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


def quantizers(model: nn.Module) -> list[LearnedFakeQuantize]:
    return [module for module in model.modules() if isinstance(module, LearnedFakeQuantize)]


def same(left: nn.Module, right: nn.Module) -> bool:
    return torch.equal(evaluate(left, images(seed=33)), evaluate(right, images(seed=33)))


def reloaded(model: nn.Module, method: str) -> nn.Module:
    fresh = prepared(method, seed=5)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), strict=True)
    return fresh


WAYS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "deepcopy": lambda model, method: copy.deepcopy(model),
    "pickle": lambda model, method: pickle.loads(pickle.dumps(model)),
    "state dict": reloaded,
}


@every
@pytest.mark.parametrize(("way", "steps"), [("deepcopy", 0), ("state dict", 0), *((way, 2) for way in WAYS)])
def test_copies_go_on_as_the_model_does(method: str, way: str, steps: int) -> None:
    model = trained(method, steps) if steps else prepared(method)
    twin = WAYS[way](model, method)
    if steps:
        assert same(model, twin)
    assert [q.seen_data for q in quantizers(model)] == [q.seen_data for q in quantizers(twin)] == [
        bool(steps) for _ in quantizers(model)
    ]
    for seed in (1, 2):
        for one in (model, twin):
            step(one, images(8, seed=seed))
    if way != "state dict" or steps:  # without steps the fresh model has weights and statistics that it took over
        assert same(model, twin)
    before = evaluate(model, images())
    step(twin, images(8, seed=3))
    assert torch.equal(before, evaluate(model, images()))


@some
def test_trained_codes_are_converted_codes(method: str) -> None:
    model = trained(method, 4)
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=9))


@learned
def test_parameters_are_there_before_data_and_all_of_them_learn(method: str) -> None:
    model = prepared(method)
    names = {name for name, _ in model.named_parameters() if "quantizer" in name}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for seed in range(2):
        optimizer.zero_grad()
        (model(images(8, seed=seed)) - 3).square().mean().backward()
        optimizer.step()
    state = model.state_dict()
    assert names and names == {name for name, _ in model.named_parameters() if "quantizer" in name}
    stuck = [name for name in names if name.endswith("change") and not state[name].any()]
    # PACT's bound moves by its regularizer at least; LSQ+ has an offset gradient only where something is clipped.
    assert not [name for name in stuck if not name.endswith("offset_change")]


@learned
def test_weight_decay_leaves_scales_where_they_start(method: str) -> None:
    model = prepared(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    step(model, images(8), rate=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [q.scale.clone() for q in quantizers(model)]
    for _ in range(20):
        optimizer.step()
    assert all(torch.equal(one, q.scale) for one, q in zip(before, quantizers(model), strict=True))


@learned
class TestStart:
    def test_calibration_takes_in_every_batch_until_a_gradient_comes(self, method: str) -> None:
        model = prepared(method)
        model.train()
        scales = []
        with torch.no_grad():
            for seed in range(3):
                model(images(8, seed=seed) * (1 + seed))
                scales.append(model.conv1.input_quantizers["0"].scale.clone())
        assert len({float(scale) for scale in scales}) > 1 or method == "tqt"  # a power of two may stay
        step(model, images(8), rate=0.0)
        held = [q.start.clone() for q in quantizers(model)]
        step(model, images(8, seed=4) * 50, rate=0.0)
        assert all(torch.equal(one, q.start) for one, q in zip(held, quantizers(model), strict=True))

    def test_calibration_after_learning_changes_nothing(self, method: str) -> None:
        model = reloaded(trained(method), method)  # the gradient's notice is not in the state dict: δ ≠ 0 is
        moved = [q for q in quantizers(model) if bool((q.change != 0).all())]
        assert len(moved) > 3
        before = [q.scale.clone() for q in moved]
        model.train()
        with torch.no_grad():
            model(images(8) * 30)
        assert all(torch.equal(one, q.scale) for one, q in zip(before, moved, strict=True))

    def test_disable_observer_holds_it(self, method: str) -> None:
        model = prepared(method)
        model.train()
        with torch.no_grad():
            model(images(8))
        model.apply(qbench.disable_observer)
        held = [q.start.clone() for q in quantizers(model)]
        with torch.no_grad():
            model(images(8) * 30)
        assert all(torch.equal(one, q.start) for one, q in zip(held, quantizers(model), strict=True))

    def test_a_grid_can_be_given(self, method: str) -> None:
        model = trained(method)
        quantizer = model.conv1.output_quantizer
        spec = quantizer.spec
        scale, zero = torch.tensor(0.25), torch.tensor(-3, dtype=torch.int32)
        quantizer.set_grid(qbench.QParams(scale, zero, spec.qmin, spec.qmax))
        found = quantizer.deployed_qparams()
        torch.testing.assert_close(found.scale, scale, rtol=2e-7, atol=0)
        assert found.zero_point == zero

    def test_a_weight_of_another_shape_is_refused(self, method: str) -> None:
        quantizer = qbench.get_qconfig(method=method).make_weight(axis=0)
        if not quantizer.learned:
            return
        with pytest.raises(NumericsError, match=r"has room for scales of shape \(\).*fit_to\(weight\)"):
            quantizer.train().qparams_of(torch.randn(4, 3))


class TestSharing:
    @some
    def test_a_branch_and_a_concat(self, method: str) -> None:
        config = qbench.get_qconfig(method=method, weight_bits=4, activation_bits=4)
        model = qbench.prepare_qat(
            qbench.fuse(Branchy()), qconfig=config, example_inputs=[(images(), True), (images(), False)]
        )
        assert model.conv1.output_quantizer is model.conv2.output_quantizer
        shared = model.conv1.output_quantizer
        assert not shared.learned or sum(parameter is shared.change for parameter in model.parameters()) == 1
        model.train()
        x = images(8)
        (model(x, True).square().mean() + model(x * 3, False).square().mean()).backward()
        assert all(torch.isfinite(parameter.grad) for parameter in shared.parameters())
        model.eval()
        assert_exact(model, qbench.convert(model, (x,)), images(8, seed=3))
        heads = train(prepared(method, TwoHeads), images(8), steps=2)
        assert_exact(heads, qbench.convert(heads, (images(),)), images(seed=3))

    @learned
    def test_the_start_takes_in_both_users(self, method: str) -> None:
        # The first use sees no negative values: its one-sided grid must not stay for the second.
        config = qbench.get_qconfig(method=method, activation_bits=4)
        quantizer = config.make_activation().train()
        x = images()
        first = quantizer(x.abs())
        second = quantizer(x)
        (first.sum() + second.sum()).backward()
        assert quantizer.zero_point > quantizer.spec.qmin
        assert evaluate(quantizer, x).min() < 0

    @learned
    def test_links_must_be_known(self, method: str) -> None:
        with pytest.raises(LinkError, match="learned quantizers need example_inputs"):
            qbench.prepare_qat(qbench.fuse(SmallNet()), qconfig=qbench.get_qconfig(method=method))


@every
def test_devices_and_dtypes(method: str) -> None:
    model = trained(method)
    moved = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in [*moved.parameters(), *moved.buffers()])
    moved.train()
    # What is read on the host would raise here.
    assert all(out.is_meta for out in leaves(moved(images().to("meta"))))
    double = copy.deepcopy(model).double()
    step(double, images(8).double())
    assert evaluate(double, images().double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, images(8))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(q.scale.dtype == torch.float32 for q in model.modules() if isinstance(q, FakeQuantize) and q.learned)


@pytest.mark.slow
@every
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of its own doing
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_training_steps(method: str) -> None:
    eager, other = prepared(method), prepared(method)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        for one, owner in ((eager, eager), (compiled, other)):
            one.train()
            owner.zero_grad()
            one(images(8, seed=seed)).square().mean().backward()
            with torch.no_grad():
                for parameter in owner.parameters():
                    parameter -= 0.01 * parameter.grad
    for (name, ours), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    for (name, ours), theirs in zip(eager.named_buffers(), other.buffers(), strict=True):
        if ".observer." not in name:  # compiled code goes on observing, which changes nothing once δ ≠ 0
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@learned
def test_ddp(method: str, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, inner = prepared(method), prepared(method)
        wrapped = nn.parallel.DistributedDataParallel(inner)
        for seed in range(2):
            for one in (plain, wrapped):
                step(one, images(8, seed=seed))
        assert same(plain, inner)
    finally:
        torch.distributed.destroy_process_group()


def test_quantizers_of_two_kinds_do_not_become_one() -> None:
    """A concatenation needs one grid; LSQ and PACT learn different things of it."""
    model = Calls(
        lambda m, x: m.cat(m.left(x), m.right(x)),
        left=nn.Conv2d(3, 4, 1),
        right=nn.Conv2d(3, 4, 1),
        cat=qbench.nn.Cat(1),
    )
    for branch, method in ((model.left, "lsq"), (model.right, "pact"), (model.cat, "lsq")):
        branch.qconfig = qbench.get_qconfig("xnnpack", activation_method=method)
    with pytest.raises(LinkError, match=r"they differ.* has LSQ of .* has PACT of "):
        qbench.prepare_qat(model, example_inputs=(images(),))
