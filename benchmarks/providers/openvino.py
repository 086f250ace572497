"""OpenVINO on the CPU, converted straight from the PyTorch module."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Runtime, converted
from benchmarks.providers.missing import missing

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class OpenVino(Runtime):
    name = "OpenVINO"

    def skip(self, case: Case) -> str:
        if case.device.type != "cpu":
            return "measured on the CPU only"
        return missing("openvino") or ("" if case.dtype in _NAMES else f"does not take {case.dtype}")

    def inputs(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # It takes and gives fp32, and computes in the case's dtype.
        return tuple(x.float().contiguous() for x in given)

    def build(self, subject: Subject, case: Case) -> Call:
        import openvino

        module = converted(subject, case, torch.contiguous_format).float()
        inputs = self.inputs(subject.inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it traces by torch.jit
            model = openvino.convert_model(module, example_input=inputs)
        model.reshape(
            {node: openvino.PartialShape(list(x.shape)) for node, x in zip(model.inputs, inputs, strict=True)}
        )
        config = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": _NAMES[case.dtype],
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.compile_model(model, "CPU", config).create_infer_request()

        def run(*given: Tensor):
            arrays = [x.numpy() for x in given]
            results = request.infer(arrays, share_inputs=True, share_outputs=True)
            return [torch.from_numpy(array) for array in results.values()]

        return run


PROVIDERS = [OpenVino()]
