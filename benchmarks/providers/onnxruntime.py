"""ONNX Runtime, on the CPU or through its CUDA provider; the model is exported by torch.onnx."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Runtime, converted
from benchmarks.providers.missing import missing

_NAMES = {torch.float32: "float32", torch.float16: "float16"}


class OnnxRuntime(Runtime):
    name = "ONNX Runtime"

    def skip(self, case: Case) -> str:
        reason = missing("onnxruntime") or missing("onnx") or missing("onnxscript")
        if reason:
            return reason
        if case.dtype not in _NAMES:
            return f"takes fp32 and fp16, not {case.dtype}"
        if case.device.type == "cuda":
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                return "onnxruntime is installed without CUDA"
        return ""

    def inputs(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.contiguous() for x in given)

    def build(self, subject: Subject, case: Case) -> Call:
        import onnxruntime

        module = converted(subject, case, torch.contiguous_format)
        inputs = self.inputs(subject.inputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Its threads would go on spinning through the next provider's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        kind = "CUDAExecutionProvider" if case.device.type == "cuda" else "CPUExecutionProvider"
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.onnx")
            torch.onnx.export(module, inputs, path, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path, options, providers=[kind])
        names = [given.name for given in session.get_inputs()]
        outputs = [given.name for given in session.get_outputs()]

        def run(*given: Tensor):
            binding = session.io_binding()
            for name, x in zip(names, given, strict=True):
                binding.bind_input(
                    name, case.device.type, case.device.index or 0, _numpy(x.dtype), x.shape, x.data_ptr()
                )
            for name in outputs:
                binding.bind_output(name, case.device.type, case.device.index or 0)
            session.run_with_iobinding(binding)
            results = binding.get_outputs()
            if case.device.type == "cpu":
                return [torch.from_numpy(result.numpy()) for result in results]
            return [torch.from_dlpack(result._ortvalue.to_dlpack()) for result in results]

        return run


def _numpy(dtype: torch.dtype):
    import numpy

    return getattr(numpy, _NAMES[dtype])


PROVIDERS = [OnnxRuntime()]
