"""Limits of the hardware: matrix products, device memory, and transfers from the host. Reference, no gates."""

import os

import torch
from gpu_parts.report import Report, products_per_second, seconds


def run(report: Report) -> None:
    """Measure the ceilings that other parts are compared with."""
    device, side = report.device, report.size(8192, 512)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report.figure("device memory", properties.total_memory / 2 ** 30, "GiB", properties.name)
    report.figure("host cores", os.cpu_count() or 1)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        with report.attempt(f"product in {name}"):
            rate = products_per_second(device, dtype, side if dtype != torch.float32 else side // 2)
            report.figure(f"product in {name}", rate / 1e12, "TFLOP/s", "random data")
    with report.attempt("copy within device memory"):
        source = torch.randint(0, 255, (report.size(4 << 30, 64 << 20),), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        elapsed_s = seconds(lambda: target.copy_(source), device)
        report.figure("copy within device memory", 2 * len(source) / elapsed_s / 1e12, "TB/s", "bytes read and written")
    _from_host(report)


def _from_host(report: Report) -> None:
    length = report.size(1 << 30, 16 << 20)
    target = torch.empty(length, dtype=torch.uint8, device=report.device)
    for name in ("pageable", "pinned"):
        with report.attempt(f"host to device, {name}"):
            source = torch.randint(0, 255, (length,), dtype=torch.uint8)
            if name == "pinned":
                if report.small:
                    report.skip("host to device, pinned", "no GPU")
                    continue
                source = source.pin_memory()
            elapsed_s = seconds(lambda source=source: target.copy_(source, non_blocking=True), report.device)
            report.figure(f"host to device, {name}", length / elapsed_s / 1e9, "GB/s")
