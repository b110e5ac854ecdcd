"""What a pass without memory finds is what autograd saves in a real one, and what is alive while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zeroopt.errors import ConfigError
from zeroopt.planner.activations import loss_of, tokens_sample, trace_activations
from zeroopt.planner.live_bytes import LiveBytes

BATCH, WIDTH = 16, 64
ROW = BATCH * WIDTH * 4  # bytes of one layer's output


class Net(nn.Module):
    def __init__(self, layers: int = 4, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)
        )
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """What autograd saves for backward, parameters and the input aside."""
    known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), x)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x).sum()
    assert saved
    del loss
    return sum(saved.values())


def test_the_peak_of_a_forward_is_what_autograd_saves() -> None:
    net, x = Net(), torch.randn(BATCH, WIDTH)
    saved = saved_bytes(net, x)
    assert saved == 8 * ROW  # the outputs of tanh; linear layers save their inputs, which are the same
    peak = trace_activations(net, x).peak
    # Beside what is saved, backward has a few rows and gradients of one layer at a time.
    assert saved <= peak <= saved + 3 * ROW + WIDTH * WIDTH * 4 + 1024


def test_a_pass_without_memory_peaks_where_a_real_one_does() -> None:
    net, x = Net(), torch.randn(BATCH, WIDTH)
    for param in net.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    with LiveBytes([*net.parameters(), x]) as live:
        net(x).sum().backward()
    assert trace_activations(net, x).peak == live.most


def test_checkpointed_blocks_keep_their_inputs_and_are_recomputed() -> None:
    x = torch.randn(BATCH, WIDTH)
    plain = trace_activations(Net(16), x).peak
    checkpointed = trace_activations(Net(16, checkpointed=True), x).peak
    assert plain > 32 * ROW
    # An input a block, what one block saves, and what backward needs.
    assert 16 * ROW <= checkpointed <= (16 + 4 + 4) * ROW + WIDTH * WIDTH * 4 + 1024


def test_gradients_come_in_the_order_of_backward() -> None:
    traced = trace_activations(Net(2), torch.randn(BATCH, WIDTH))
    assert set(traced.order[:2]) == {"layers.1.2.weight", "layers.1.2.bias"}
    assert len(traced.order) == len(traced.gradients) == len(traced.peaks) - 1 == 8
    sizes = dict(zip(traced.order, traced.gradients, strict=True))
    assert (sizes["layers.0.0.weight"], sizes["layers.0.0.bias"]) == (WIDTH * WIDTH * 4, WIDTH * 4)
    assert traced.peak == max(traced.peaks)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_stays_as_it_is(device: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.random.get_rng_state()
    trace_activations(net, torch.empty(8, 4, device="meta"))
    after = net.state_dict()
    assert all(value.device.type == device for value in after.values())
    if device == "cpu":
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(param.grad is None and not param._backward_hooks for param in net.parameters())


class Caches(nn.Linear):
    """Keeps what its first forward has made, as tables of positions are kept."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)
        return super().forward(x + self.table)


def test_a_model_that_keeps_something_of_a_forward_trains_afterwards() -> None:
    net = Caches(4, 4)
    trace_activations(net, torch.empty(8, 4))
    loss = net(torch.ones(8, 4)).sum()
    assert type(loss) is Tensor and loss.isfinite()


def test_16_bit_parameters_make_16_bit_activations() -> None:
    net, x = Net(), torch.randn(BATCH, WIDTH)
    whole = trace_activations(net, x)
    half = trace_activations(net, x, param_dtype=torch.bfloat16, cast_inputs=True)
    assert half.peak == pytest.approx(whole.peak / 2, rel=0.01)
    assert [2 * size for size in half.gradients] == list(whole.gradients)


def test_tied_parameters_have_one_gradient() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    net[1].weight = net[0].weight
    assert sorted(trace_activations(net, torch.randn(2, WIDTH)).order) == ["0.bias", "0.weight", "1.bias"]


class DependsOnValues(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x[:, 0] > 0])


def test_a_model_that_needs_values_runs_once_where_it_has_some() -> None:
    net, x = DependsOnValues(WIDTH, WIDTH), torch.ones(BATCH, WIDTH)
    expected = trace_activations(nn.Linear(WIDTH, WIDTH), x.clone()).peak
    assert trace_activations(net, x).peak >= expected
    assert net.weight.grad is None
    with pytest.raises(ConfigError, match="cannot be traced without values .*build it and the sample on the CPU"):
        trace_activations(net.to("meta"), x)


@pytest.mark.parametrize(
    ("output", "is_scalar"),
    [
        (torch.tensor(3.0), True),
        ({"logits": torch.ones(2), "loss": torch.tensor(3.0)}, True),
        ((torch.tensor([1]), torch.tensor([1.0, 2.0])), True),
    ],
)
def test_a_loss_is_found_in_what_models_return(output: Any, is_scalar: bool) -> None:
    loss = loss_of(output)
    assert float(loss) == 3.0 and (loss.dim() == 0) is is_scalar


def test_an_output_without_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="pass loss="):
        loss_of({"tokens": torch.tensor([1])})


def test_tokens_are_given_to_what_a_forward_asks_for() -> None:
    class Model(nn.Module):
        def forward(self, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> None: ...

    class Other(nn.Module):
        def forward(self, tokens: Tensor, targets: Tensor) -> None: ...

    for model, names in ((Model(), ["input_ids", "labels"]), (Other(), ["tokens", "targets"])):
        sample = tokens_sample(model, 7, batch=3)
        assert list(sample) == names
        assert all(value.shape == (3, 7) and value.dtype is torch.int64 for value in sample.values())
