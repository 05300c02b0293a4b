"""Failures of devices are recognized by the types and texts that torch and CUDA's libraries raise."""

import subprocess
import sys

import pytest
import torch

from pipeline.hardware import devices

# As torch 2.14, CUDA 13, NCCL, Triton and faiss write them.
TEXTS = [
    ("device lost", RuntimeError, "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in https://docs"),
    ("device lost", torch.AcceleratorError, "CUDA error: an illegal memory access was encountered"),
    ("device lost", torch.AcceleratorError, "CUDA error: uncorrectable ECC error encountered"),
    ("device lost", torch.AcceleratorError, "CUDA error: unspecified launch failure"),
    ("device lost", torch.AcceleratorError, "something that is not known here"),
    ("device lost", RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    ("device lost", RuntimeError, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ("device lost", torch.distributed.DistBackendError, "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error"),
    ("device lost", RuntimeError, "Triton Error [CUDA]: an illegal memory access was encountered"),
    ("device lost", RuntimeError, "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before"),
    ("out of memory", torch.OutOfMemoryError, "Allocation on device"),
    ("out of memory", torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
    ("out of memory", torch.AcceleratorError, "CUDA error: out of memory"),
    ("out of memory", RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("out of memory", RuntimeError, "StandardGpuResources: alloc fail (cudaMalloc error out of memory [2])"),
    ("out of memory", devices.OutOfDeviceMemory, "a batch of 1 does not fit"),
    ("old driver", RuntimeError, "The NVIDIA driver on your system is too old (found version 12040). Please update"),
    ("old driver", RuntimeError, "Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported "
                                 "display driver / cuda driver combination"),
    ("old driver", torch.AcceleratorError, "CUDA error: forward compatibility was attempted on non supported HW"),
    ("old driver", RuntimeError, "CUDA driver error: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
    ("no device", RuntimeError, "No CUDA GPUs are available"),
    ("no device", torch.AcceleratorError, "CUDA error: invalid device ordinal"),
    ("no device", RuntimeError, "CUDA driver initialization failed, you might not have a CUDA gpu."),
    ("no device", AssertionError, "Torch not compiled with CUDA enabled"),
    ("none", RuntimeError, "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    ("none", ValueError, "the caption says: CUDA error: out of memory"),
    ("none", OSError, "CUDA error"),
    ("none", AssertionError, ""),
]


@pytest.mark.parametrize(("kind", "error_type", "text"), TEXTS)
def test_failures_are_recognized_by_type_and_text(kind, error_type, text):
    assert devices.failure_kind(error_type(text)) == kind
    sentence, _, hint = devices.failure_hint(error_type(text)).partition("\n")
    assert bool(sentence) == hint.startswith("hint: ") == (kind != "none")
    assert devices.describe_failure(kind) == sentence.rstrip(".")
    try:
        raise ValueError("the encoder cannot be loaded") from error_type(text)
    except ValueError as error:
        assert devices.failure_kind(error) == kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_errors_of_torch_without_a_gpu_are_recognized():
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        torch.zeros(1, device="cuda")
    assert devices.failure_kind(caught.value) == "no device"


def test_torch_is_not_loaded_to_look_at_an_exception():
    code = ("import sys; from pipeline.hardware import devices; "
            "assert devices.failure_kind(RuntimeError('x')) == 'none'; "
            "devices.free_cached_memory(); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cards_are_named_as_nvidia_smi_lists_them(tmp_path, monkeypatch):
    listing = tmp_path / "nvidia-smi"
    listing.write_text('#!/bin/sh\n[ "$4" = 2 ] || exit 6\necho "NVIDIA H100 80GB HBM3, GPU-1b2c"\n')
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert devices.list_cards("2") == "NVIDIA H100 80GB HBM3 GPU-1b2c" and devices.list_cards("3") == ""
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert devices.list_cards("2") == ""


def test_a_batch_that_fits_is_not_split_and_other_errors_are_raised():
    fit, seen = devices.BatchFit(), []
    assert fit([1, 2, 3], 8, lambda rows, most: seen.append(most) or rows, sum) == [1, 2, 3]
    assert seen == [8] and fit.most is None and fit.times() == {}
    with pytest.raises(RuntimeError, match="shapes"):
        fit([1], 1, lambda *_: (_ for _ in ()).throw(RuntimeError("shapes cannot be multiplied")), sum)
