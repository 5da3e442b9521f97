"""Let torch-tensorrt 2.13 be imported, and convert on paper, where there is no GPU.

It asks for the GPU's capability when it is imported, and its libraries need a CUDA build of torch.
What is patched here is private and of that version: for tests alone.
"""

import os

import torch

LIBRARIES = "libtorchtrt"
AMPERE = (8, 0)
MEMORY = 16 << 30


def pretend():
    """Answers that it asks a GPU for, and no compiled runtime: what runs engines is not needed."""
    is_file = os.path.isfile
    os.path.isfile = lambda path: LIBRARIES not in os.path.basename(path) and is_file(path)
    torch.cuda.get_device_capability = lambda *_: AMPERE
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda *_: "none"
    torch.cuda.mem_get_info = lambda *_: (MEMORY, MEMORY)
    if not hasattr(torch._C, "_CudaDeviceProperties"):  # torch for CPUs
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    import torch_tensorrt

    torch_tensorrt._Device.Device.to = lambda *_: torch.device("cpu")
    return torch_tensorrt
