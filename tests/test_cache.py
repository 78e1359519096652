"""Pieces of a measurement on disk, and the fingerprint they lie under."""

import numpy as np
import pytest
import torch

from mpq.cache import Pieces, fingerprint_of, pieces_in


def test_pieces_are_made_once_and_found_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.arange(3.0)

    pieces = pieces_in(tmp_path / "cache", "a" * 64)
    assert pieces.get("layer/1", make).tolist() == [0, 1, 2]
    assert pieces_in(tmp_path / "cache", "a" * 64).get("layer/1", make).tolist() == [0, 1, 2]
    assert len(made) == 1
    pieces_in(tmp_path / "cache", "b" * 64).get("layer/1", make)
    assert len(made) == 2
    Pieces().get("layer/1", make)
    assert len(made) == 3


def test_an_interrupted_piece_is_not_kept(tmp_path):
    pieces = pieces_in(tmp_path, "a" * 64)

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pieces.get("x", fails)
    assert not list(tmp_path.rglob("*.npy"))


def test_fingerprints_see_values_shapes_types_names_and_texts():
    weight = torch.arange(6.0).reshape(2, 3)
    base = fingerprint_of([("w", weight)], "kl")
    assert base == fingerprint_of([("w", weight.clone())], "kl")
    changed = weight.clone()
    changed[1, 2] = np.nextafter(np.float32(5), np.float32(6)).item()
    others = [
        fingerprint_of([("w", changed)], "kl"),
        fingerprint_of([("w", weight.reshape(3, 2))], "kl"),
        fingerprint_of([("w", weight.double())], "kl"),
        fingerprint_of([("v", weight)], "kl"),
        fingerprint_of([("w", weight)], "k", "l"),
        fingerprint_of([("w", weight.to(torch.bfloat16))], "kl"),
    ]
    assert len({base, *others}) == 7


def test_an_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache must be a folder"):
        pieces_in(tmp_path / "file", "a" * 64)
