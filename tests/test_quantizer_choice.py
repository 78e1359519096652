"""Names of quantisers: GPTQ of the data, a folder of weights, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from small_models import cnn, decoder, images, tokens

import mpq
from mpq.formats import parse
from mpq.gptq import GPTQ, input_hessians
from mpq.quantizer_choice import choose_quantizer
from mpq.weight_database import WeightDatabase

INT3 = parse("int3").bind("weight")


def test_gptq_is_that_of_the_inputs_on_the_data():
    model, data = cnn(), images(batches=3, samples=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = choose_quantizer("gptq", model, iter(data))  # read once
    layers = mpq.trace(model, data[0][0]).layers
    by_hand = GPTQ(hessians=input_hessians(model, data, layers))
    first = layers[0]
    assert torch.equal(found(model.first.weight, INT3, first), by_hand(model.first.weight, INT3, first))
    assert found.digest == by_hand.digest
    assert not torch.equal(found(model.first.weight, INT3, first), model.first.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_gptq_cannot_quantise_is_rounded():
    """A transposed convolution has no Hessian, and GGUF blocks no range."""
    for model, data in ((cnn(), images()), (decoder(), tokens())):
        layers = mpq.trace(model, data[0] if isinstance(data[0], dict) else data[0][0]).layers
        found = choose_quantizer("gptq", model, data)
        for layer in layers:
            rows = torch.randn(layer.weight_shape)
            assert found(rows, parse("q4_0"), layer).shape == rows.shape
            assert found(rows, INT3, layer).shape == rows.shape


def test_a_folder_is_a_database_of_weights_and_nearest_the_default(tmp_path):
    save_file({"first.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "int3.safetensors")
    assert isinstance(choose_quantizer(tmp_path, cnn(), images()), WeightDatabase)
    assert isinstance(choose_quantizer(str(tmp_path), cnn(), images()), WeightDatabase)
    assert choose_quantizer("nearest", cnn(), images()) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [("gtpq", "nearest, gptq or a folder .*'gtpq'.*did you mean 'gptq'"), ("no/folder", "got 'no/folder'")],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        choose_quantizer(name, cnn(), images())


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a folder with .safetensors files"):
        choose_quantizer(tmp_path, cnn(), images())
