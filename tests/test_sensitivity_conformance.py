"""Every method keeps the promises that ship for those of other packages."""

from importlib import import_module

import pytest

from mpq.estimator_conformance import EstimatorConformance
from mpq.sensitivity import METHODS, Entropy

SETTINGS = {"hessian_trace": {"probes": 8}, "ggn_trace": {"draws": 2}, "linearity": {"levels": (0.1, 0.2)}}


class TestEveryMethod(EstimatorConformance):
    @pytest.fixture(params=sorted(set(METHODS) - {"entropy"}))
    def estimator(self, request):
        module, name = METHODS[request.param]
        return getattr(import_module(f"mpq.sensitivity.{module}"), name)(**SETTINGS.get(request.param, {}))


class TestEntropy(EstimatorConformance):
    is_error = False

    @pytest.fixture
    def estimator(self):
        return Entropy()


@pytest.mark.parametrize("name", ["fisher", "kl", "weight_error"])
def test_the_same_tests_hold_for_finer_units(name):
    module, kind = METHODS[name]
    estimator = getattr(import_module(f"mpq.sensitivity.{module}"), kind)()
    promises = EstimatorConformance()
    promises.granularities = () if name == "kl" else ("rows:2", "groups:2")
    promises.test_units_finer_than_layers_are_scored_or_refused(estimator)
    if name == "kl":
        promises.granularities = ("rows:2",)
        with pytest.raises(AssertionError, match="rows:2 is taken"):
            promises.test_units_finer_than_layers_are_scored_or_refused(estimator)
