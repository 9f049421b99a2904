"""What a QAT layer carries: state dict, copies, pickles, devices, dtypes; and what it runs under: autocast, compile,
DDP, gradient checkpointing."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qbench
from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.layer import QatLayer

from .support import CASES, Case, batch, case_named, float_output, in_eval, make_layer, same_bits

SHAPE = (4, 3, 8, 8)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    chain = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    return chain.eval()


def prepared(seed: int = 0, steps: int = 2, **options: object) -> nn.Module:
    found = qbench.prepare_qat(
        qbench.fuse(model(seed)), qconfig=qbench.get_qconfig(**options), example_inputs=(batch(SHAPE),)
    )
    found.train()
    optimizer = torch.optim.SGD(found.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        found(batch(SHAPE, seed=step)).square().sum().backward()
        optimizer.step()
    return found


def same_outputs(left: nn.Module, right: nn.Module) -> bool:
    x = batch(SHAPE, seed=77)
    return same_bits(left.eval()(x), right.eval()(x))


class TestStateDict:
    def test_round_trip_into_a_fresh_model(self) -> None:
        trained = prepared()
        fresh = prepared(seed=1, steps=0)
        assert fresh.load_state_dict(trained.state_dict(), strict=True) == nn.modules.module._IncompatibleKeys([], [])
        assert same_outputs(trained, fresh)
        assert fresh.state_dict().keys() == trained.state_dict().keys()

    def test_it_is_tensors_only(self, tmp_path: Path) -> None:
        trained = prepared()
        torch.save(trained.state_dict(), tmp_path / "qat.pt")
        fresh = prepared(seed=1, steps=0)
        fresh.load_state_dict(torch.load(tmp_path / "qat.pt", weights_only=True))
        assert same_outputs(trained, fresh)

    @pytest.mark.parametrize("switch", ["observer", "fake-quant", "seen data", "bn statistics"])
    def test_switches_are_in_it(self, switch: str) -> None:
        trained = prepared(steps=0 if switch == "seen data" else 2)
        if switch == "observer":
            trained.apply(qbench.disable_observer)
        elif switch == "fake-quant":
            trained.apply(qbench.disable_fake_quant)
        elif switch == "bn statistics":
            trained.apply(qbench.freeze_bn_stats)
        fresh = prepared(seed=1)
        fresh.load_state_dict(trained.state_dict())
        activations = [
            (a, b)
            for a, b in zip(trained.modules(), fresh.modules(), strict=True)
            if isinstance(a, FakeQuantize) and not a.observer.stateless
        ]
        assert len(activations) == 5
        for ours, theirs in activations:
            assert theirs.observer_enabled == ours.observer_enabled == (switch != "observer")
            assert theirs.fake_quant_enabled == ours.fake_quant_enabled == (switch != "fake-quant")
            assert theirs.seen_data == ours.seen_data == (switch != "seen data")
        if switch == "bn statistics":
            fresh.train()
            means = [m.bn.running_mean.clone() for m in fresh.modules() if isinstance(m, QatLayer) and m.bn is not None]
            fresh(batch(SHAPE))
            after = [m.bn.running_mean for m in fresh.modules() if isinstance(m, QatLayer) and m.bn is not None]
            assert all(same_bits(a, b) for a, b in zip(means, after, strict=True))

    def test_training_goes_on_as_it_would_have(self) -> None:
        trained, fresh = prepared(), prepared(seed=1, steps=0)
        fresh.load_state_dict(trained.state_dict())
        for step in range(2):
            for one in (trained, fresh):
                one.train()
                out = one(batch(SHAPE, seed=50 + step))
                one.zero_grad()
                out.square().sum().backward()
                with torch.no_grad():
                    for parameter in one.parameters():
                        parameter -= 0.05 * parameter.grad
        assert same_outputs(trained, fresh)

    def test_a_per_channel_range_grows_when_loaded(self) -> None:
        spec = qbench.QSpec(bits=8, axis=1)
        config = qbench.QuantizerConfig(spec)
        seen, fresh = config.make(), config.make()
        seen.train()(batch((2, 3, 4)))
        fresh.load_state_dict(seen.state_dict())
        x = batch((2, 3, 4), seed=2)
        assert fresh.scale.shape == (3,)
        assert same_bits(seen.eval()(x), fresh.eval()(x))

    def test_missing_and_unexpected_keys_are_reported(self) -> None:
        trained = prepared()
        state = trained.state_dict()
        key = next(name for name in state if name.endswith("output_quantizer.scale"))
        state["nonsense"] = state.pop(key)
        with pytest.raises(RuntimeError, match=r"Missing key.*output_quantizer\.scale[\s\S]*Unexpected key.*nonsense"):
            prepared(seed=1, steps=0).load_state_dict(state)


class TestCopies:
    def test_deepcopy_is_whole_and_apart(self) -> None:
        trained = prepared()
        twin = copy.deepcopy(trained)
        assert same_outputs(trained, twin)
        quantizers = {id(m) for m in twin.modules() if isinstance(m, FakeQuantize)}
        for layer in twin.modules():
            if isinstance(layer, QatLayer):
                assert {id(source) for source in layer.sources} <= quantizers  # links point into the copy
        twin.train()
        before = trained.eval()(batch(SHAPE)).clone()
        for step in range(3):
            twin(batch(SHAPE, seed=step, spread=5.0))
        assert same_bits(trained(batch(SHAPE)), before)
        assert not same_outputs(trained, twin)

    @pytest.mark.parametrize("how", ["pickle", "torch.save"])
    def test_pickle(self, how: str) -> None:
        trained = prepared()
        if how == "pickle":
            twin = pickle.loads(pickle.dumps(trained))
        else:
            buffer = io.BytesIO()
            torch.save(trained, buffer)
            twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert same_outputs(trained, twin)
        quantizers = {id(m) for m in twin.modules() if isinstance(m, FakeQuantize)}
        layers = [m for m in twin.modules() if isinstance(m, QatLayer)]
        assert len(layers) == 3
        assert all(id(source) in quantizers for layer in layers for source in layer.sources)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_every_kind_of_layer(self, case: Case) -> None:
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=4)
        in_eval(layer, x)
        wanted = layer(x)
        assert same_bits(copy.deepcopy(layer)(x), wanted)
        assert same_bits(pickle.loads(pickle.dumps(layer))(x), wanted)
        assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


class TestDevicesAndTypes:
    def test_a_move_takes_links_and_ranges_along(self) -> None:
        trained = prepared()
        moved = copy.deepcopy(trained).to("meta")
        tensors = [*moved.parameters(), *moved.buffers()]
        assert all(tensor.is_meta for tensor in tensors)
        for layer in moved.modules():
            if isinstance(layer, QatLayer):
                assert all(source.scale.is_meta for source in layer.sources)
        assert moved.eval()(batch(SHAPE).to("meta")).shape == (4, 5)

    def test_from_float_on_the_device_of_the_weight(self) -> None:
        module = nn.Conv2d(3, 4, 3, device="meta")
        layer = case_named("conv").qat.from_float(module, qbench.get_qconfig())
        assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])

    @pytest.mark.parametrize("name", ["conv", "conv bias bn", "linear bn relu", "transposed bn relu"])
    def test_double(self, name: str) -> None:
        # Grids stay those of float32; what lies between them is float64.
        case = case_named(name)
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=4)
        in_eval(layer, x)
        wanted = float_output(layer, x)
        codes = layer.parameter_codes()
        double = copy.deepcopy(layer).double()
        got = float_output(double, x.double())
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(double.parameter_codes().weight, codes.weight)
        out = double.train()(x.double().requires_grad_())
        out.sum().backward()
        assert all(parameter.grad.dtype == torch.float64 for parameter in double.parameters())

    def test_channels_last(self) -> None:
        case = case_named("conv bias bn")
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=4)
        in_eval(layer, x)
        wanted = layer(x)
        step = layer.output_quantizer.scale.item()
        got = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert (got - wanted).abs().max() < 1.01 * step
        assert (got != wanted).float().mean() < 0.01


class TestAutocast:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_bfloat16_trains(self, case: Case) -> None:
        layer, _ = make_layer(case)
        layer.train()
        x = batch(case.shape, seed=4)
        plain = copy.deepcopy(layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        weights = torch.randn(out.shape)
        (out.float() * weights).sum().backward()
        (plain(x) * weights).sum().backward()
        assert out.dtype == torch.bfloat16
        scale = layer.output_quantizer.scale
        assert scale.dtype == torch.float32
        assert scale.item() == pytest.approx(plain.output_quantizer.scale.item(), rel=0.05)
        for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad.dtype == torch.float32 and torch.isfinite(ours.grad).all()
            if name == "bias" and case.has_bn:
                continue  # zero up to rounding
            cosine = torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0)
            assert cosine > 0.95, name

    def test_a_model_trains(self) -> None:
        trained = prepared()
        trained.train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (trained(batch(SHAPE)).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        # codes are computed in float32 whatever the activations were
        for layer in trained.modules():
            if isinstance(layer, QatLayer):
                assert layer.parameter_codes().bias_value.dtype == torch.float32


def checkpointed(layer: QatLayer, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def test_gradient_checkpointing_of_a_layer_with_fixed_ranges() -> None:
    case = case_named("conv bias bn")
    layer, _ = make_layer(case)
    in_eval(layer, batch(case.shape))
    layer.apply(qbench.disable_observer)
    layer.apply(qbench.freeze_bn_stats)
    layer.train()
    found = []
    for call in (layer.__call__, lambda x: checkpointed(layer, x)):
        layer.zero_grad()
        x = batch(case.shape, seed=4).requires_grad_()
        out = call(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of its own doing
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
class TestCompile:
    def test_eval_is_that_of_the_eager_model(self) -> None:
        trained = prepared(bias_bits=16).eval()
        x = batch(SHAPE, seed=4)
        compiled = torch.compile(trained, fullgraph=True)
        with torch.no_grad():
            wanted, got = trained(x), compiled(x)
        steps = [m.output_quantizer.scale.item() for m in trained.modules() if isinstance(m, QatLayer)]
        assert (got - wanted).abs().max() <= 1.01 * steps[-1]
        assert (got == wanted).float().mean() > 0.8

    def test_parameters_have_the_same_bits_when_compiled(self) -> None:
        # Square roots, divisions and roundings of the folding must not depend on who computes them.
        case = case_named("grouped bn relu6")
        layer, _ = make_layer(case, bias_bits=16)
        layer.eval()

        @torch.compile(fullgraph=True)
        def parameters() -> tuple[Tensor, Tensor]:
            grid, bias, scale = layer.quantized_parameters()
            return grid.folded(), layer.bias_quantizer(bias, scale)

        with torch.no_grad():
            weight, bias = parameters()
            grid, folded, scale = layer.quantized_parameters()
            assert torch.equal(weight, grid.folded())
            assert torch.equal(bias, layer.bias_quantizer(folded, scale))

    def test_training_step(self) -> None:
        # Captured and functionalised, then run by eager kernels: the same numbers, buffers included.
        eager, other = prepared(), prepared()
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        x = batch(SHAPE, seed=4)
        for one in (eager, compiled):
            one.train()
            one(x).square().sum().backward()
        for (name, ours), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
            size = max(ours.grad.abs().max().item(), 1.0)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * size, msg=name)
        for (name, ours), theirs in zip(eager.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_step_under_ddp(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, inner = prepared(), prepared()
        wrapped = nn.parallel.DistributedDataParallel(inner)
        for step in range(2):
            for one in (plain, wrapped):
                one.train()
                one.zero_grad()
                one(batch(SHAPE, seed=step)).square().sum().backward()
                with torch.no_grad():
                    for parameter in one.parameters():
                        parameter -= 0.05 * parameter.grad
        assert same_outputs(plain, inner)
    finally:
        torch.distributed.destroy_process_group()


def test_first_batch_under_ddp_needs_no_shape_change() -> None:
    # DDP broadcasts buffers by reference: a per-tensor range must stay in the tensors that it was given.
    fresh = prepared(steps=0)
    buffers = {name: buffer for name, buffer in fresh.named_buffers() if name.endswith(("scale", "zero_point", "_val"))}
    fresh.train()(batch(SHAPE))
    after = dict(fresh.named_buffers())
    assert buffers and all(after[name] is buffer for name, buffer in buffers.items())
