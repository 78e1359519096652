"""From a transformers checkpoint to a model quantised by torchao in five lines, and what must not pass unnoticed."""

import warnings

import pytest
import torch
from torch import nn

import mpq
from mpq.options import Option
from mpq.plan import Entry, Plan


@pytest.fixture(scope="module", autouse=True)
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao", reason="the extra mpq-search[torchao] is not installed")


TEXTS = ("one layer in four bits", "the next one takes eight of them", "and the head too", "as it may well need")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random Llama and its tokenizer, words for tokens."""
    transformers = pytest.importorskip("transformers", reason="the extra mpq-search[transformers] is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    words = ["<pad>", "<unk>", *dict.fromkeys(" ".join(TEXTS).split())]
    plain = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that formats matter
    model.save_pretrained(folder)
    return folder


def perplexity(model, batches):
    losses = []
    for batch in batches:
        with torch.no_grad():
            losses.append(model(**batch, labels=batch["input_ids"]).loss)
    return float(torch.stack(losses).mean().exp())


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten(0, 1) for batch in batches])


def test_five_lines_from_a_checkpoint_to_a_quantised_model(checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options, budgets = ["int4@group32", "int8"], {"size": "20%"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    plan = mpq.search(model, data, options, budgets, target="torchao", progress=False)
    quantised = mpq.apply(model, plan, "torchao")

    assert quantised is model
    exact = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert set(plan.options.values()) == {"int4@group32", "int8"}
    bits = {name: option.split("@")[0] for name, option in plan.options.items()}
    held = {name: str(model.get_submodule(name).weight.target_dtype).removeprefix("torch.") for name in bits}
    assert held == bits
    with mpq.quantized(exact, plan):
        simulated, expected = logits(exact, data), perplexity(exact, data)
    reference, deployed = logits(exact, data), logits(model, data)
    error, planned = (deployed - reference).norm(), (simulated - reference).norm()
    assert 0.5 * planned < error < 1.5 * planned
    assert perplexity(model, data) == pytest.approx(expected, rel=0.05)
    assert type(model.lm_head.weight) is type(model.model.embed_tokens.weight) is not nn.Parameter


@pytest.mark.parametrize("labels", [False, True])
def test_batches_of_a_tokenizer_are_data_padded_and_with_labels(checkpoint, labels):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()
    given = dict(batch) if labels else batch
    if labels:
        given["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plan = mpq.search(model, [given], ["int4", "int8"], {"size": "20%"}, target="torchao", progress=False)
    assert plan.proof.status == "optimal"
    alone = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    found, expected = (
        mpq.measure(model, data, ["int4", "int8"], progress=False).quantities["sensitivity"]
        for data in ([given], alone)
    )
    assert found == pytest.approx(expected, rel=0.02, abs=1e-9)  # padding counts for nothing


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def plan_for(model, *options):
    network = mpq.trace(model, torch.randn(2, 64))
    entries = (Entry(layer, Option.parse(option)) for layer, option in zip(network.layers, options, strict=True))
    return Plan(tuple(entries), network.fingerprint)


@pytest.mark.parametrize("option", ["int2", "int4@group32", "int8", "int8/int8@token", "int4/uint8@token", "fp8_e4m3"])
def test_every_kind_of_weight_is_applied_and_others_are_left(option):
    model = net()
    left = model[2].weight
    mpq.apply(model, plan_for(model, option, "fp32"))
    assert hasattr(model[0].weight, "qdata")
    assert model[2].weight is left


def test_a_plan_of_floats_changes_nothing():
    model, x = net(), torch.randn(4, 64)
    before = model(x)
    mpq.apply(model, plan_for(model, "fp32", "bf16"))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_what_torchao_skips_or_does_otherwise_is_an_error(monkeypatch):
    import torchao.quantization as quantization

    original = quantization.quantize_
    model, plan = net(), plan_for(net(), "int4", "int8")
    monkeypatch.setattr(quantization, "quantize_", lambda *_, **__: None)
    with pytest.raises(
        RuntimeError, match=r"'0' was planned in int4 and is still a Parameter.*'2' was planned in int8"
    ):
        mpq.apply(model, plan)
    others = {"bits": plan_for(net(), "int5", "int8"), "scales": plan_for(net(), "int4@group16", "int8")}
    others |= {"inputs": plan_for(net(), "int4/uint8@token", "int8"), "more": plan_for(net(), "int4", "int8")}
    for what, other in others.items():
        from torchao.core.config import config_from_dict

        config = config_from_dict(mpq.export(other, "torchao"))
        monkeypatch.setattr(quantization, "quantize_", lambda m, _, config=config, **how: original(m, config, **how))
        asked = plan_for(net(), "int4", "fp32") if what == "more" else plan
        with pytest.raises(
            RuntimeError, match="'2' was planned in fp32" if what == "more" else "'0' was planned in int4"
        ):
            mpq.apply(net(), asked)


def test_a_plan_that_cannot_be_held_or_is_another_models_leaves_the_model():
    model = net()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="torchao cannot hold nf4"):
        mpq.apply(model, plan_for(model, "nf4", "int8"))
    with pytest.raises(ValueError, match="the plan is for another model"):
        mpq.apply(nn.Sequential(nn.Linear(64, 32)), plan_for(model, "int4", "int8"))
    with pytest.raises(ValueError, match="export target 'torchoa' is not known.*'torchao'"):
        mpq.apply(model, plan_for(model, "int4", "int8"), "torchoa")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
