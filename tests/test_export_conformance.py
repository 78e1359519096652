"""Every export target keeps the promises that ship for others'; ONNX Runtime's is a file, tested apart."""

import warnings

import pytest

from mpq.exporter_conformance import ExporterConformance
from mpq.exporting import TARGETS


class TestEveryTarget(ExporterConformance):
    @pytest.fixture(params=sorted(set(TARGETS) - {"onnxruntime", "hawq"}))
    def exporter(self, request):
        target = TARGETS[request.param]
        if target.apply is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pytest.importorskip(request.param, reason=f"the extra mpq-search[{request.param}] is not installed")
        return target


class TestHAWQ(ExporterConformance):
    writes_inputs = False  # its bit_config has one number a module

    @pytest.fixture
    def exporter(self):
        return TARGETS["hawq"]
