"""Every device keeps the promises that ship for those of other packages."""

import pytest

from mpq.device_conformance import DeviceConformance
from mpq.hardware_models import available, compose, load, storage


class TestEveryDevice(DeviceConformance):
    @pytest.fixture(params=available())
    def device(self, request):
        return load(request.param)


class TestStorage(DeviceConformance):
    @pytest.fixture
    def device(self):
        return storage()


class TestComposition(DeviceConformance):
    @pytest.fixture
    def device(self):
        return compose(latency=load("nvidia-t4"), energy=load("eyeriss"))
