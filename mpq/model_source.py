"""What MODEL on the command line may be: the demo, a function in a Python file, a transformers folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

DEMOS = ("demo", "demo-transformer")
NO_DATA = "scored by weight error alone, which knows nothing of the loss: give --data TEXT for a better plan"


@dataclass(frozen=True)
class ModelSource:
    """A model, calibration data, and where given a task and held-out data.

    Where `data` is None, `model` is a `mpq.checkpoints.Checkpoint`, of which weights alone are scored; `notes` say so.
    """

    model: nn.Module | Any
    data: Any
    task: Any = None
    holdout: Any = None
    notes: tuple[str, ...] = ()


def load_source(
    name: str, *, text: str | None = None, samples: int = 16, tokens: int = 128, files: bool = False
) -> ModelSource:
    """The model and data that a name on the command line stands for.

    Args:
        name: "demo", "demo-transformer", "FILE.py:function" (returns model, data and optionally a task and held-out
            data), or a folder that transformers reads.
        text: a text file that calibrates a transformers folder.
        samples: windows of text to calibrate on; as many again are held out.
        tokens: tokens a window.
        files: take a safetensors file, or a folder of them without `text`, as a checkpoint whose model is not built.

    Raises:
        ValueError: if it is none of these, or the function returns something else.
    """
    if name in DEMOS:
        return _demo(name)
    path, colon, _ = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _returned(name, call_function(name))
    if files and text is None and Path(name).exists():
        from mpq.checkpoints import is_checkpoint, read_checkpoint

        if is_checkpoint(name):
            found = read_checkpoint(name)
            return ModelSource(found, None, notes=(NO_DATA, *found.notes))
    if Path(name).is_dir():
        return _transformers_folder(Path(name), text, samples, tokens)
    raise ValueError(f"MODEL must be {', '.join(DEMOS)}, FILE.py:function or a transformers folder, got {name!r}")


def call_function(name: str) -> Any:
    """Call "FILE.py:function".

    Raises:
        ValueError: if there is no such file or function, or running it fails.
    """
    function = load_function(name)
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{name!r} failed: {_failure(error, Path(name.rpartition(':')[0]))}") from error


def load_function(name: str) -> Callable[..., Any]:
    """The function that "FILE.py:function" names.

    Raises:
        ValueError: if there is no such file or function.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not file.endswith(".py") or not function:
        raise ValueError(f"a function must be given as FILE.py:function, got {name!r}")
    if not path.is_file():
        raise ValueError(f"cannot read {name!r}: there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {file!r} as Python")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"cannot import {file!r}: {_failure(error, path)}") from error
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{file!r} has no function {function!r}")
    loaded: Callable[..., Any] = found
    return loaded


@dataclass(frozen=True)
class FileFunction:
    """A function of a file that is told apart by all of the file: what it calls there counts as well.

    Attributes:
        name: "FILE.py:function".
        digest: of the file.
        function: what is called.
    """

    name: str
    digest: str
    function: Callable[..., Any]

    @classmethod
    def load(cls, name: str) -> FileFunction:
        """The function that "FILE.py:function" names; raises what `load_function` raises."""
        function = load_function(name)
        return cls(name, hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest(), function)

    @property
    def __name__(self) -> str:
        """Its own name."""
        return self.name.rpartition(":")[2]

    def __call__(self, *arguments: Any) -> Any:
        """What the function makes of them."""
        return self.function(*arguments)


def check_holdout(source: ModelSource) -> ModelSource:
    """The source with held-out data read once, after the model has run on a batch of it: not only after the search.

    Raises:
        ValueError: if the held-out data is empty or not finite, or the model cannot run on it.
    """
    if source.holdout is None:
        return source
    import torch

    from mpq.batches import batches_of, call, model_inputs
    from mpq.surgery import evaluating

    holdout = batches_of(source.holdout, role="held-out data")
    with evaluating(source.model), torch.no_grad():
        try:
            call(source.model, model_inputs(source.model, holdout[0]))
        except Exception as error:
            raise ValueError(f"the model cannot run on the held-out data: {type(error).__name__}: {error}") from error
    return replace(source, holdout=holdout)


def _failure(error: Exception, path: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    where = f" ({path.name}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def _demo(name: str) -> ModelSource:
    from mpq import demo

    digits = demo.digits()
    model = demo.cnn() if name == "demo" else demo.transformer()
    return ModelSource(model, digits.calibration, holdout=digits.holdout)


def _returned(name: str, value: Any) -> ModelSource:
    if not isinstance(value, tuple) or not 2 <= len(value) <= 4:
        raise ValueError(f"{name} must return (model, data), (model, data, task) or (model, data, task, holdout)")
    from torch import nn

    if not isinstance(value[0], nn.Module):
        raise ValueError(
            f"{name} must return (model, data), the model a torch.nn.Module, got {type(value[0]).__name__}"
        )
    return ModelSource(*value)


def _transformers_folder(folder: Path, text: str | None, samples: int, tokens: int) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} must be a transformers folder: it has no config.json")
    if text is None:
        raise ValueError(f"{str(folder)!r} needs text to calibrate on: give --data FILE.txt")
    if not Path(text).is_file():
        raise ValueError(f"cannot read text {text!r}: there is no such file")
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers folders need transformers: pip install 'mpq-search[transformers]'") from error
    from mpq.checkpoint_graph import is_causal

    config = transformers.AutoConfig.from_pretrained(folder)
    causal = is_causal(config)
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = loader.from_pretrained(folder, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = _windows(tokenizer, Path(text), samples, tokens)
    calibration, holdout = (
        [_batch(part[i : i + 4], causal=causal) for i in range(0, samples, 4)]
        for part in (windows[:samples], windows[samples:])
    )
    return ModelSource(model, calibration, holdout=holdout)


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
