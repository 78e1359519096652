"""Tasks: losses, masks, shifts and distances against plain loops; what data and outputs suggest."""

import math

import pytest
import torch
from small_models import SmallDecoder, cnn, decoder, images, tokens
from torch import nn
from torch.nn import functional

from mpq.batches import batch_size, batches_of, split_batch
from mpq.task_choice import choose_task
from mpq.tasks import CustomLoss, Distribution, Features, Outputs


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
