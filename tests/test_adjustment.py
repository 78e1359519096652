"""Tensors that go with a quantised model: put in, taken out, saved."""

import pytest
import torch
from small_models import cnn, decoder
from torch import nn

import mpq
from mpq.adjustment import Adjustment, modules_with_bias
from mpq.layers import Layer


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()


NEW = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2), "1.running_mean": torch.ones(2), "2.bias": torch.zeros(2)}


def test_tensors_are_in_place_inside_and_gone_outside_also_after_an_error():
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in net.state_dict().items()}
    x = torch.randn(4, 3)
    by_hand = net[2].weight @ ((x.sum(1) + 1 - 1) / (net[1].running_var[0] + net[1].eps).sqrt()).expand(2, 4)
    with Adjustment("all", NEW).applied(net), torch.no_grad():
        torch.testing.assert_close(net(x), by_hand.T)
        assert net.state_dict()["0.bias"].tolist() == [1, 1]
    with pytest.raises(RuntimeError), Adjustment("all", NEW).applied(net):
        net(torch.zeros(1, 5))
    assert set(net.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert pointers == {name: value.data_ptr() for name, value in net.state_dict().items()}
    assert net[0].bias is None


def test_what_the_model_lacks_is_named_and_nothing_stays_behind():
    net = model()
    for name, shape in (("3.weight", 2), ("0.scale", 2), ("0.bias.x", 2), ("2.bias", 3)):
        wrong = Adjustment("wrong", {"0.bias": torch.ones(2), name: torch.ones(shape)})
        with pytest.raises(ValueError, match=f"needs a tensor {name!r} of shape"), wrong.applied(net):
            pass
        assert net[0].bias is None


def test_the_way_to_disk_and_back(tmp_path):
    Adjustment("bias correction", NEW).save(tmp_path / "a.safetensors")
    loaded = Adjustment.load(tmp_path / "a.safetensors")
    assert loaded.name == "bias correction"
    assert all(torch.equal(loaded.tensors[name], value) for name, value in NEW.items())
    (tmp_path / "b.safetensors").write_bytes(b"no")
    for name, message in (("b", "cannot read adjustment"), ("c", "cannot read adjustment")):
        with pytest.raises(ValueError, match=message):
            Adjustment.load(tmp_path / f"{name}.safetensors")


def test_dtype_is_that_of_the_model():
    net = model().half()
    with Adjustment("all", NEW).applied(net):
        assert {value.dtype for value in net.state_dict().values() if value.is_floating_point()} == {torch.float16}


def test_modules_with_bias():
    net = cnn()
    network = mpq.trace(net, torch.randn(1, 1, 6, 6))
    assert [name for layer in network.layers for name, _ in modules_with_bias(net, layer)] == [
        "first.bias", "depthwise.bias", "up.bias", "head.bias"
    ]  # fmt: skip
    tied = decoder()
    layers = mpq.trace(tied, {"input_ids": torch.zeros(1, 2, dtype=torch.long)}).layers
    names = {name for layer in layers for name, _ in modules_with_bias(tied, layer)}
    assert names == {"q.bias", "k.bias", "v.bias", "o.bias", "lm_head.bias"}
    function = Layer("f", "linear", (2, 2), 4, 4, (1, 2), (1, 2), weight_name="0.weight", module=None)
    assert modules_with_bias(net, function) == []
