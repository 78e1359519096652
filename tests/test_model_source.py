"""What MODEL on the command line may be."""

import sys
from types import SimpleNamespace

import pytest
import torch
from small_models import cnn, images

from mpq.model_source import ModelSource, call_function, check_holdout, load_source


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that a stand-in for transformers reads, and a text of 1000 tokens."""

    def loader(value):
        return SimpleNamespace(from_pretrained=lambda *_, **__: value)

    fake = SimpleNamespace(
        AutoConfig=loader(SimpleNamespace(architectures=["TinyForCausalLM"])),
        AutoModelForCausalLM=loader(torch.nn.Linear(1, 1)),
        AutoTokenizer=loader(lambda text: {"input_ids": list(range(len(text)))}),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("x" * 1000)
    return tmp_path


@pytest.mark.parametrize("samples", [1, 2, 5, 6, 16])
def test_as_many_windows_are_held_out_as_calibrate(folder, samples):
    source = load_source(str(folder), text=str(folder / "text.txt"), samples=samples, tokens=10)
    for data, first in ((source.data, 0), (source.holdout, 10 * samples)):
        windows = torch.cat([batch["input_ids"] for batch in data])
        assert windows.flatten().tolist() == list(range(first, first + 10 * samples))
        assert max(len(batch["input_ids"]) for batch in data) <= 4


def test_a_missing_or_short_text_is_named(folder):
    with pytest.raises(ValueError, match="nothing.txt': there is no such file"):
        load_source(str(folder), text=str(folder / "nothing.txt"))
    with pytest.raises(ValueError, match="must hold 4096 tokens"):
        load_source(str(folder), text=str(folder / "text.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_module\n", "line 1"),
        ("def load(:\n", "SyntaxError"),
        ("\n\n1 / 0\n", r"ZeroDivisionError.*line 3"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"cannot import .*broken.py.*{message}"):
        call_function(f"{path}:load")


def test_held_out_data_is_read_once():
    source = check_holdout(ModelSource(cnn(), images(), holdout=(batch for batch in images())))
    assert isinstance(source.holdout, list)
    assert len(source.holdout) == len(images())
