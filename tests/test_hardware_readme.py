"""The page on device files names every key and device, and its example is a device file."""

import re
from pathlib import Path

import pytest

import mpq.hardware_models as hardware
from mpq.hardware_models.device_file import SCHEMA, parse_target

PAGE = (Path(__file__).parents[1] / "hardware_models" / "README.md").read_text(encoding="utf-8")


def test_the_example_is_a_device_file():
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    target = parse_target(example)
    assert target.limits == {"activation_peak": 2097152.0}
    assert sum(number.is_estimate for number in target.numbers) == 4


@pytest.mark.parametrize("name", SCHEMA)
def test_every_table_and_key_is_explained(name):
    title = "memory.NAME" if name.startswith("memory.") else name
    section = re.search(rf"\*\*`\[+{re.escape(title)}\]+`\*\*(.*?)(?=\n\*\*`|\nMemories)", PAGE, re.DOTALL)
    assert section, f"no section about {title}"
    for key in SCHEMA[name].keys:
        star = r"\*" if key.required else r"\s"
        assert re.search(rf"`{key.name}`{star}", section[1]), f"{title}: {key.name} is not explained"
    if name.startswith("memory."):
        assert name.removeprefix("memory.") in PAGE.rpartition("Memories:")[2]


@pytest.mark.parametrize("name", hardware.available())
def test_every_device_is_listed_with_its_estimates(name):
    target = hardware.load(name)
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert row.split("|")[2].strip() == target.runtime
    estimates = sum(number.is_estimate for number in target.numbers)
    assert row.split("|")[4].strip() == f"{len(target.numbers)}, {estimates}"
