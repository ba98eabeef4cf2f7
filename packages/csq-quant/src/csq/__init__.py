"""CSQ: mixed-precision quantization grown by bi-level continuous sparsification (DAC 2023).

    csq.parametrize(model)
    schedule = csq.Schedule(model, target_bits=2.0, steps=steps)
    for x, y in loader:
        loss = cross_entropy(model(x), y) + schedule.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad(); schedule.step()
    final = csq.harden(model)

Xiao, Yang, Dong, Keutzer, Du, Zhang: "CSQ: Growing Mixed-Precision Quantization Scheme with Bi-level
Continuous Sparsification", DAC 2023, arXiv 2212.02770.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from csq.bitops import bit_operations
    from csq.files import load, save
    from csq.hardened import harden, reestimate_batchnorm
    from csq.onnx_export import compare_onnx, export_onnx
    from csq.optimizer_groups import check_param_groups, param_groups
    from csq.parametrization import bit_layers, parametrize
    from csq.planes import BitPlanes
    from csq.schedule import Schedule
    from csq.size_report import Report, report

__all__ = [
    "parametrize",
    "Schedule",
    "param_groups",
    "check_param_groups",
    "bit_layers",
    "BitPlanes",
    "harden",
    "reestimate_batchnorm",
    "report",
    "Report",
    "bit_operations",
    "save",
    "load",
    "export_onnx",
    "compare_onnx",
]

# Each name is imported at first use, so that `csq --help` and its errors about options need no torch.
_HOME = {
    "parametrize": "parametrization",
    "Schedule": "schedule",
    "param_groups": "optimizer_groups",
    "check_param_groups": "optimizer_groups",
    "bit_layers": "parametrization",
    "BitPlanes": "planes",
    "harden": "hardened",
    "reestimate_batchnorm": "hardened",
    "report": "size_report",
    "Report": "size_report",
    "bit_operations": "bitops",
    "save": "files",
    "load": "files",
    "export_onnx": "onnx_export",
    "compare_onnx": "onnx_export",
}

# Modules that are reached as attributes: csq.functional.bit_weight.
_MODULES = ("functional", "storage")

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
