"""TensorRT through Torch-TensorRT."""

from __future__ import annotations

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Runtime, converted
from benchmarks.providers.missing import missing


class TensorRT(Runtime):
    name = "Torch-TensorRT"
    capturable = True

    def skip(self, case: Case) -> str:
        return missing("torch_tensorrt") if case.device.type == "cuda" else "needs a CUDA GPU"

    def build(self, subject: Subject, case: Case) -> Call:
        import torch_tensorrt

        return torch_tensorrt.compile(
            converted(subject, case),
            ir="dynamo",
            inputs=list(subject.inputs),
            enabled_precisions={case.dtype},
            use_explicit_typing=False,
        )


PROVIDERS = [TensorRT()]
