"""Squared errors that another program measured, in the scores that need no more."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import save_file
from small_models import cnn, images

import mpq
from mpq.error_database import ErrorDatabase
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.options import SearchSpace
from mpq.sensitivity import estimate, score_checkpoint
from mpq.weight_view import as_rows

INT4 = parse("int4").bind("weight")
SETTINGS = {"hessian_trace": {"probes": 4}, "ggn_trace": {"draws": 2}}


def scores(quantizer, method="weight_error", options=("int3", "int8", "fp16"), **settings):
    model, data = cnn(), images()
    network = mpq.trace(model, data[0][0])
    return estimate(model, data, network, SearchSpace(options), method, quantizer=quantizer, progress=False, **settings)


def measured(granularity="layer", factor=1.0):
    """Errors of rounding, measured here layer by layer, row block by row block or group by group."""
    model = cnn()
    network = mpq.trace(model, images()[0][0])
    rows = []
    for unit in network.units(granularity):
        weight = as_rows(model.get_parameter(unit.layer.weight_name).detach(), unit.layer)
        part = weight.reshape(weight.shape[0], -1)[unit.rows, unit.columns]
        for option in ("int3", "int8"):
            change = (fake_quantize(part, option) - part).double()
            rows.append({"layer": unit.label, "option": option, "weight_error": factor * float(change.square().sum())})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("granularity", ["layer", "rows:2", "groups:4"])
@pytest.mark.parametrize("method", ["weight_error", "hessian_trace", "ggn_trace"])
def test_scores_are_those_of_the_quantiser_whose_errors_they_are(method, granularity):
    asked = {"method": method, "granularity": granularity, **SETTINGS.get(method, {})}
    expected = scores(None, **asked)
    shuffled = measured(granularity).sample(frac=1, random_state=0)
    np.testing.assert_allclose(scores(ErrorDatabase(shuffled), **asked), expected, rtol=1e-12)
    doubled = scores(ErrorDatabase(measured(granularity, factor=2.0)), **asked)
    rounded = expected.index.get_level_values("option") != "fp16"
    np.testing.assert_allclose(doubled[rounded], 2 * expected[rounded], rtol=1e-12)
    np.testing.assert_allclose(doubled[~rounded], expected[~rounded], rtol=1e-12)


def test_inputs_are_still_quantised_and_measured_here():
    asked = {"method": "ggn_trace", "options": ["int3/int4", "int8"], "draws": 2}
    exact = scores(None, **asked)
    np.testing.assert_allclose(scores(ErrorDatabase(measured()), **asked), exact, rtol=1e-12)


def test_files_hold_what_the_frame_holds(tmp_path):
    frame = measured("groups:4")  # labels with commas
    frame.to_csv(tmp_path / "errors.csv", index=False)
    frame.set_index(["layer", "option"]).to_parquet(tmp_path / "errors.parquet")
    frame.rename(columns={"weight_error": "gptq"}).to_parquet(tmp_path / "named.parquet")
    texts = {
        repr(ErrorDatabase(frame)),
        repr(ErrorDatabase(tmp_path / "errors.csv")),
        repr(ErrorDatabase(str(tmp_path / "errors.parquet"))),
        repr(ErrorDatabase(tmp_path / "named.parquet", column="gptq")),
        repr(ErrorDatabase(frame.iloc[::-1])),
    }
    assert len(texts) == 1
    changed = frame.copy()
    changed.loc[3, "weight_error"] *= 1.001
    assert repr(ErrorDatabase(changed)) not in texts


def test_errors_of_a_checkpoint_serve_as_a_database(tmp_path):
    model = cnn()
    linear = {"head.weight": model.head.weight.detach()}
    save_file(linear, tmp_path / "model.safetensors")
    database = ErrorDatabase(score_checkpoint(tmp_path, ["int4"], progress=False))
    expected = (fake_quantize(model.head.weight.detach(), "int4") - model.head.weight.detach()).square().sum()
    assert database.squared_errors(["head"], INT4)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_scores_that_need_weights_are_refused():
    database = ErrorDatabase(measured())
    for method in ("kl", "fisher", "obs", "sqnr"):
        with pytest.raises(ValueError, match="the weight of '.*' in int.@channel is not known, only its error: use"):
            scores(database, method)


FRAME = pd.DataFrame({"layer": ["fc1", "fc2"], "option": ["int4", "w4"], "weight_error": [1.0, 2.0]})


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"no errors for int8@channel in the database: did you mean 'int4@channel'"):
        ErrorDatabase(FRAME[:1]).squared_errors(["fc1"], parse("int8").bind("weight"))
    with pytest.raises(ValueError, match=r"no error of 'fc9' for int4@channel in the database: did you mean 'fc1'"):
        ErrorDatabase(FRAME[:1]).squared_errors(["fc1", "fc9"], INT4)


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ("errors.txt", "a .csv or .parquet file that is there, got 'errors.txt'"),
        ("absent.csv", "that is there, got 'absent.csv'"),
        (FRAME.drop(columns="option"), "errors must have 'option', got the columns"),
        (FRAME.rename(columns={"weight_error": "mse"}), "errors must have 'weight_error'"),
        (FRAME.assign(weight_error=[1.0, -1.0]), "at least 0, that of 'fc2' for w4 is -1.0"),
        (FRAME.assign(weight_error=["1.0", "no"]), "at least 0, that of 'fc2' for w4 is nan"),
        (FRAME.assign(layer="fc1", option="int4"), "given once, 'fc1' has two for int4@channel"),
        (FRAME.assign(layer="fc1"), "given once, 'fc1' has two for int4@channel"),
        (FRAME.assign(option="int99"), "int must have 2 to 16 bits"),
    ],
)
def test_what_is_no_database_is_refused(errors, message):
    with pytest.raises(ValueError, match=message):
        ErrorDatabase(errors)


def test_layers_may_come_in_two_spellings_of_a_format():
    assert ErrorDatabase(FRAME).squared_errors(["fc2", "fc1"], INT4).tolist() == [2.0, 1.0]
