"""Tasks: losses, masks, shifts and distances against plain loops; what data and outputs suggest."""

import math
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from small_models import SmallDecoder, cnn, decoder, images, tokens
from torch import nn
from torch.nn import functional

from mpq.batches import batch_size, batches_of, model_inputs, split_batch, takes_labels, tensors_of
from mpq.task_choice import choose_task
from mpq.tasks import CustomLoss, Distribution, Features, Outputs, cloned, drawn_labels


def test_causal_loss_is_transformers_shifted_cross_entropy_a_sample():
    model, ids = decoder(), tokens()[0]["input_ids"]
    labels = ids.clone()
    labels[0, 4:] = -100
    outputs = Distribution(causal=True).run(model, {"input_ids": ids, "labels": labels})
    losses = Distribution(causal=True).losses(outputs)
    logits = model(ids)["logits"]
    for sample in range(len(ids)):
        kept = [t for t in range(1, ids.shape[1]) if labels[sample, t] != -100]
        expected = sum(functional.cross_entropy(logits[sample, t - 1], labels[sample, t]) for t in kept) / len(kept)
        assert losses[sample].item() == pytest.approx(expected.item(), rel=1e-5)
    assert outputs.positions().tolist() == [3, 6, 6]


def test_classes_second_is_moved_last_for_images_of_labels():
    logits, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    outputs = Distribution().run(nn.Identity(), (logits, labels))
    losses = Distribution().losses(outputs)
    expected = functional.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(losses, expected)


def test_kl_is_zero_for_equal_outputs_and_the_sum_over_classes_otherwise():
    p, q = torch.randn(4, 7), torch.randn(4, 7)
    task = Distribution()
    assert (task.divergence(Outputs(p), Outputs(p + 3.0)) < 1e-12).all()
    divergence = task.divergence(Outputs(p), Outputs(q))
    for sample in range(4):
        a, b = p[sample].softmax(0), q[sample].softmax(0)
        expected = sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(a, b, strict=True))
        assert divergence[sample].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3])
def test_kl_of_a_small_change_is_half_its_fisher_form(eps):
    torch.manual_seed(0)
    z, dz = torch.randn(1, 9, dtype=torch.float64), torch.randn(1, 9, dtype=torch.float64)
    p = z.softmax(-1)
    fisher = torch.diag(p[0]) - p.T @ p
    ratio = Distribution().divergence(Outputs(z), Outputs(z + eps * dz)).item() / (
        0.5 * eps**2 * (dz @ fisher @ dz.T).item()
    )
    assert ratio == pytest.approx(1, abs=eps)


def test_gradients_of_sampled_losses_have_the_fisher_information_as_covariance():
    z = torch.tensor([[[0.5, -1.0, 0.3]]]).repeat(20000, 2, 1).requires_grad_()
    Distribution().sampled_losses(Outputs(z), torch.Generator().manual_seed(0)).sum().backward()
    p = z[0, 0].detach().softmax(-1)
    covariance = torch.einsum("ntc,ntd->cd", z.grad, z.grad) / (z.shape[0] * z.shape[1])
    error = (covariance - (torch.diag(p) - torch.outer(p, p))).abs().max()
    assert error < 4 / math.sqrt(40000)


def test_labels_are_drawn_in_the_proportions_of_the_softmax():
    draws, classes = 20000, 12
    logits = 2 * torch.randn(classes, generator=torch.Generator().manual_seed(3))
    counts = drawn_labels(logits.expand(draws, classes), torch.Generator().manual_seed(0)).bincount(minlength=classes)
    expected = draws * logits.double().softmax(-1)
    assert expected.min() > 20
    chi_square = float(((counts - expected).square() / expected).sum())
    assert 2.6 < chi_square < 26.8  # the 0.5th and 99.5th percentile for 11 degrees of freedom, from a table


def test_labels_are_where_a_walk_over_the_classes_ends(monkeypatch):
    logits = torch.randn(23, 7)
    logits[::3, [0, 4, 6]] = -math.inf
    monkeypatch.setattr("mpq.tasks._AT_ONCE", 7 * 5)  # four chunks of rows and a short one
    found = drawn_labels(logits, torch.Generator().manual_seed(8))
    uniform = torch.rand(23, 1, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for row, label in enumerate(found.tolist()):
        left, walked = uniform[row].item() * logits[row].double().softmax(0).sum().item(), 0
        for probability in logits[row].double().softmax(0).tolist():
            left -= probability
            if left < 0:
                break
            walked += 1
        assert label == walked
        assert logits[row, label] > -math.inf


def test_masks_leave_positions_out_of_every_mean():
    p, q = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    task = Distribution()
    masked = task.divergence(Outputs(p, mask), Outputs(q, mask))
    assert masked[1].item() == pytest.approx(task.divergence(Outputs(p[1:, :2]), Outputs(q[1:, :2])).item())
    agreement = task.agreement(Outputs(p, mask), Outputs(q, mask))
    assert agreement[1].item() == (p[1, :2].argmax(-1) == q[1, :2].argmax(-1)).double().mean().item()


def test_features_are_compared_by_relative_squared_error():
    y, z = torch.randn(3, 6), torch.randn(3, 6)
    expected = (z.double() - y.double()).square().sum(1) / y.double().square().sum(1)
    torch.testing.assert_close(Features().divergence(Outputs(y), Outputs(z)), expected)
    outputs = Features().run(nn.Identity(), (y, z))
    torch.testing.assert_close(Features().losses(outputs), (y - z).square().mean(1))


class WithLoss(SmallDecoder):
    """Returns its own loss and no logits."""

    def forward(self, input_ids, labels):
        logits = super().forward(input_ids)["logits"]
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_what_data_and_outputs_suggest():
    ids = tokens()[0]
    assert choose_task(cnn(), images()[0]) == Distribution()
    assert choose_task(cnn(), images()[0][0]) == Distribution()
    assert choose_task(nn.Linear(3, 1), torch.randn(4, 3)) == Features()
    assert choose_task(nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2))) == Features()
    assert choose_task(nn.Sequential(nn.Linear(3, 4), Normalise()), torch.randn(5, 3)) == Features()
    assert choose_task(decoder(), ids) == Distribution()
    own = choose_task(WithLoss(), {**ids, "labels": ids["input_ids"]})
    assert isinstance(own, CustomLoss)
    assert choose_task(cnn(), images()[0], "causal-lm") == Distribution(causal=True)
    with pytest.raises(ValueError, match="task must be one of classification"):
        choose_task(cnn(), images()[0], "classify")


class Normalise(nn.Module):
    def forward(self, x):
        return functional.normalize(x, dim=-1)


def test_a_loss_of_the_users_own_counts_by_its_increase():
    task = choose_task(cnn(), images()[0], lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]))
    outputs = task.run(cnn(), images()[0])
    assert outputs.values.shape == (3, 1)
    assert (task.divergence(outputs, outputs) == 0).all()
    assert task.agreement(outputs, outputs) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least one batch"),
        ([torch.empty(0, 3)], "batch 0 of data must hold samples"),
        ([torch.ones(2, 3), torch.tensor([[1.0, float("nan")]])], "batch 1 of data must be finite, 1 of 2 values"),
        ([{"x": torch.tensor([float("inf")])}], "batch 0 of data must be finite"),
        (3, "must be a batch or an iterable"),
        (["text"], "must hold tensors"),
    ],
)
def test_bad_data_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        batches_of(data)


def test_batches_in_every_form():
    x, y = torch.ones(2, 3), torch.ones(2, dtype=torch.long)
    assert split_batch((x, y)) == (x, y)
    assert split_batch([x]) == (x, None)
    assert split_batch({"a": x, "labels": y}) == ({"a": x}, y)
    assert batch_size({"a": x}) == 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(5, 3), torch.ones(5)), batch_size=2)
    assert [batch_size(batch) for batch in batches_of(loader)] == [2, 2, 1]
    with pytest.raises(ValueError, match="got 3 parts"):
        split_batch((x, y, y))


class GivesLogits(nn.Module):
    def forward(self, x):
        return {"logits": x}


def test_where_the_classes_are_does_not_depend_on_a_length_that_equals_their_number():
    logits, labels = torch.randn(2, 5, 5), torch.randint(0, 5, (2, 5))
    outputs = Distribution().run(GivesLogits(), {"x": logits, "labels": labels})
    assert torch.equal(outputs.values, logits)


def test_unlabelled_maps_are_features_and_as_distributions_have_their_classes_second():
    maps = torch.randn(2, 5, 3, 4)
    assert choose_task(nn.Identity(), maps) == Features()
    assert torch.equal(Distribution().run(nn.Identity(), maps).values, maps.movedim(1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_models_are_not_rounded_to_half_precision(dtype):
    logits, labels = torch.randn(64, 9).to(dtype), torch.randint(0, 9, (64,))
    losses = Distribution().losses(Distribution().run(nn.Identity(), (logits, labels)))
    torch.testing.assert_close(losses, functional.cross_entropy(logits.float(), labels, reduction="none"))
    large = (1e3 * torch.ones(1, 10**4)).half()
    assert Features().sampled_losses(Outputs(large), torch.Generator().manual_seed(0)).isfinite().all()


def test_divergences_made_row_by_row_are_those_of_torch(monkeypatch):
    torch.manual_seed(0)
    p, q = torch.randn(3, 5, 7) * 4, torch.randn(3, 5, 7) * 4
    p[0, 0, 2] = -torch.inf
    exact = p.double().softmax(-1)
    terms = torch.where(exact > 0, exact * (p.double().log_softmax(-1) - q.double().log_softmax(-1)), 0.0)
    for size in (1, 7 * 4, 2**17):
        monkeypatch.setattr("mpq.tasks._AT_ONCE", size)
        found = Distribution().divergence(Outputs(p), Outputs(q))
        torch.testing.assert_close(found, terms.sum(-1).mean(1), rtol=1e-12, atol=1e-15)


def test_ruled_out_classes_and_padding_without_numbers_do_not_spoil_a_divergence():
    p, q = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = Distribution().divergence(Outputs(p[..., :3]), Outputs(q[..., :3]))
    p[..., 3] = q[..., 3] = -math.inf
    torch.testing.assert_close(Distribution().divergence(Outputs(p), Outputs(q)), expected)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    p[1, 0] = math.nan
    for task in (Distribution(), Features()):
        values = (p[..., :3], q[..., :3])
        assert task.divergence(*(Outputs(part, mask) for part in values)).isfinite().all()


@pytest.mark.parametrize("loss", [lambda model, batch: 1.0, lambda model, batch: torch.ones(3, 7)])
def test_a_loss_that_is_neither_one_number_nor_one_a_sample_is_refused(loss):
    with pytest.raises(ValueError, match=r"a loss must be a tensor of one number, or of one a sample \(3,\)"):
        CustomLoss(loss).run(cnn(), images()[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_labels_go_to_models_that_take_them_only():
    labelled = {**tokens()[0], "labels": tokens()[0]["input_ids"]}
    assert choose_task(decoder(), labelled) == Distribution()
    assert model_inputs(decoder(), labelled).keys() == {"input_ids"}
    assert model_inputs(WithLoss(), labelled).keys() == {"input_ids", "labels"}
    assert takes_labels(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))) == "no"


def test_the_class_of_a_model_counts_more_than_the_checkpoint_it_came_from():
    class NetForSequenceClassification(SmallDecoder):
        config = SimpleNamespace(architectures=["NetLMHeadModel"])

    class Net(NetForSequenceClassification):
        pass

    assert choose_task(NetForSequenceClassification(), tokens()[0]) == Distribution()
    assert choose_task(Net(), tokens()[0]) == Distribution(causal=True)


def test_one_batch_as_a_list_and_several_as_a_tuple_are_noticed():
    with pytest.raises(ValueError, match=r"make it a tuple \(inputs, targets\)"):
        batches_of([torch.ones(2, 3), torch.zeros(2, dtype=torch.long)])
    with pytest.raises(ValueError, match=r"2 parts \(tuple, tuple\); several batches go in a list"):
        split_batch(tuple(images()))


class Centring(nn.Linear):
    """Writes to what it is given."""

    def forward(self, x):
        return super().forward(x.sub_(1.0))


Pair = namedtuple("Pair", "first second")


def test_a_model_that_writes_to_its_input_leaves_the_data_alone():
    model, x, labels = Centring(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    exact, expected = x.clone(), model(x.clone())
    for data in (x, (x, labels), {"x": x, "labels": labels}):
        choose_task(model, data)
        for task in (Distribution(), Features()):
            assert torch.equal(task.run(model, data).values, expected)
        CustomLoss(lambda model, batch: model(next(tensors_of(batch))).sum(1)).run(model, data)
    assert torch.equal(x, exact)


def test_a_nest_is_cloned_tensor_by_tensor():
    given = {"a": [torch.ones(2), "text"], "b": (Pair(torch.zeros(1), 3), None)}
    copy = cloned(given)
    for tensor in tensors_of(copy):
        tensor.add_(5)
    assert [tensor.tolist() for tensor in tensors_of(given)] == [[1, 1], [0]]
    assert copy["a"][1] == "text"
    assert copy["b"] == (Pair(torch.full((1,), 5.0), 3), None)
