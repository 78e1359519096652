"""Kernels of PyTorch on this machine's processor: what onnxruntime has not, bf16 and fp16 among them.

    weights and inputs   linear               convolution
    fp32, bf16, fp16     torch.mm             conv1d, conv2d, conv3d, not transposed
    int8                 torch._int_mm (int32 results, which nothing rescales)

A weight-only format has no kernel of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernels import Clock, Kernel, NoKernel, Run, clock_of

_FLOATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class TorchKernels:
    """Kernels of PyTorch with a number of threads.

    Example:
        >>> source = TorchKernels()
        >>> source(Kernel("linear", 2, 16, 8, weight="bf16", activation="bf16"))().shape
        torch.Size([2, 8])
    """

    threads: int = 1

    @property
    def name(self) -> str:
        """The version and the threads."""
        import torch

        return f"torch {torch.__version__}, CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def clock(self) -> Clock:
        """Processor time of one thread, passing time of several."""
        return clock_of(self.threads)

    def __call__(self, kernel: Kernel) -> Run:
        """Prepare weights and inputs.

        Raises:
            NoKernel: if no operator runs the kernel.
        """
        import torch

        kernel = kernel.with_geometry()
        if kernel.weight != kernel.activation or kernel.is_transposed or kernel.weight not in (*_FLOATS, "int8"):
            pair = f"{kernel.weight} weights and {kernel.activation} inputs"
            raise NoKernel(f"torch has no kernel for {pair} in a {kernel.kind}")
        random = torch.Generator().manual_seed(0)
        if kernel.weight == "int8":
            if kernel.is_convolution:
                raise NoKernel(f"torch has no kernel for int8 weights and int8 inputs in a {kernel.kind}")
            left = torch.randint(-100, 100, (kernel.m, kernel.k), dtype=torch.int8, generator=random)
            right = torch.randint(-100, 100, (kernel.k, kernel.n), dtype=torch.int8, generator=random)
            return self._timed(lambda: torch._int_mm(left, right), kernel)
        dtype = getattr(torch, _FLOATS[kernel.weight])
        if not kernel.is_convolution:
            x = torch.randn(kernel.m, kernel.k, generator=random).to(dtype)
            weight = torch.randn(kernel.k, kernel.n, generator=random).to(dtype)
            return self._timed(lambda: torch.mm(x, weight), kernel)
        inputs, outputs = kernel.channels
        image = torch.randn(kernel.image, generator=random).to(dtype)
        shape = (outputs, inputs // kernel.repeats, *kernel.window)
        taps = torch.randn(shape, generator=random).to(dtype)
        convolve = getattr(torch.nn.functional, kernel.kind.removeprefix("depthwise_"))
        padding = tuple(-(-max(0, w - s) // 2) for w, s in zip(kernel.window, kernel.strides, strict=True))
        settings = {"stride": kernel.strides, "padding": padding, "groups": kernel.repeats}
        return self._timed(lambda: convolve(image, taps, **settings), kernel)

    def _timed(self, run: Run, kernel: Kernel) -> Run:
        """The run with this number of threads and no gradients, over every expert."""
        import torch

        times = kernel.repeats if kernel.kind == "experts" else 1

        def timed() -> object:
            if torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)
            with torch.inference_mode():
                for _ in range(times - 1):
                    run()
                return run()

        return timed
