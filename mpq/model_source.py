"""What MODEL on the command line may be: the demo, a function in a Python file, a transformers folder."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

DEMOS = ("demo", "demo-transformer")


@dataclass(frozen=True)
class ModelSource:
    """A model, calibration data, and where given a task and held-out data."""

    model: nn.Module
    data: Any
    task: Any = None
    holdout: Any = None


def load_source(name: str, *, text: str | None = None, samples: int = 16, tokens: int = 128) -> ModelSource:
    """The model and data that a name on the command line stands for.

    Args:
        name: "demo", "demo-transformer", "FILE.py:function" (returns model, data and optionally a task and held-out
            data), or a folder that transformers reads.
        text: a text file that calibrates a transformers folder.
        samples: windows of text to calibrate on; as many again are held out.
        tokens: tokens a window.

    Raises:
        ValueError: if it is none of these, or the function returns something else.
    """
    if name in DEMOS:
        return _demo(name)
    path, colon, _ = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _returned(name, call_function(name))
    if Path(name).is_dir():
        return _transformers_folder(Path(name), text, samples, tokens)
    raise ValueError(f"MODEL must be {', '.join(DEMOS)}, FILE.py:function or a transformers folder, got {name!r}")


def call_function(name: str) -> Any:
    """Call "FILE.py:function".

    Raises:
        ValueError: if there is no such file or function.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"cannot read {name!r}: there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {file!r} as Python")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file!r} has no function {function!r}")
    return getattr(module, function)()


def _demo(name: str) -> ModelSource:
    from mpq import demo

    digits = demo.digits()
    model = demo.cnn() if name == "demo" else demo.transformer()
    return ModelSource(model, digits.calibration, holdout=digits.holdout)


def _returned(name: str, value: Any) -> ModelSource:
    if not isinstance(value, tuple) or not 2 <= len(value) <= 4:
        raise ValueError(f"{name} must return (model, data), (model, data, task) or (model, data, task, holdout)")
    return ModelSource(*value)


def _transformers_folder(folder: Path, text: str | None, samples: int, tokens: int) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} must be a transformers folder: it has no config.json")
    if text is None:
        raise ValueError(f"{str(folder)!r} needs text to calibrate on: give --data FILE.txt")
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers folders need transformers: pip install 'mpq-search[transformers]'") from error
    config = transformers.AutoConfig.from_pretrained(folder)
    causal = any("CausalLM" in name for name in config.architectures or ())
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = loader.from_pretrained(folder, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = _windows(tokenizer, Path(text), samples, tokens)
    batches = [_batch(windows[i : i + 4], causal=causal) for i in range(0, len(windows), 4)]
    half = len(batches) // 2
    return ModelSource(model, batches[:half], holdout=batches[half:])


def _windows(tokenizer: Any, text: Path, samples: int, tokens: int) -> Any:
    import torch

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read text {str(text)!r}: {error}") from error
    ids = torch.tensor(tokenizer(content)["input_ids"])
    needed = 2 * samples * tokens
    if len(ids) < needed:
        raise ValueError(f"{str(text)!r} must hold {needed} tokens (twice {samples} x {tokens}), it holds {len(ids)}")
    return ids[:needed].reshape(-1, tokens)


def _batch(windows: Any, *, causal: bool) -> dict[str, Any]:
    import torch

    batch = {"input_ids": windows, "attention_mask": torch.ones_like(windows)}
    return batch | {"labels": windows} if causal else batch
