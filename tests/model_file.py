"""What a user's file for the command line looks like."""

from small_models import cnn, images


def load():
    """A model, calibration data, no task of its own, and held-out data."""
    return cnn(), images(batches=2, samples=8), None, images(batches=3, samples=8)[2:]


def wrong():
    return cnn()


def empty():
    return cnn(), []


def unheld():
    return cnn(), images(batches=2, samples=8)


def failing():
    raise RuntimeError("no checkpoint")


def no_model():
    return "model", images()


def no_holdout():
    return cnn(), images(), None, []


def other_holdout():
    return cnn(), images(), None, [images()[0][0].expand(-1, 2, -1, -1)]
