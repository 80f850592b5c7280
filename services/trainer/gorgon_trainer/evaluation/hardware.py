"""What figures were measured on: a figure without its machine says nothing."""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Hardware:
    """One process's machine, as far as speed depends on it."""

    device: str  # the GPU's name, or the CPU's
    num_devices: int  # GPUs; 1 on a CPU
    memory_bytes: int | None  # of one device; None where the system does not say
    cpu: str
    num_cpus: int  # that this process may use
    torch_version: str
    cuda_version: str | None

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) for people."""
        on_cpu = self.cuda_version is None
        many = f"{self.num_devices} x " if self.num_devices > 1 else ""
        rows = [] if on_cpu else [("GPU", f"{many}{self.device}")]
        rows.append(("CPU", f"{self.cpu}, {self.num_cpus} cores"))
        if self.memory_bytes is not None:
            rows.append(("Memory" if on_cpu else "GPU memory", f"{self.memory_bytes / 2**30:.0f} GiB"))
        cuda = "" if on_cpu else f", CUDA {self.cuda_version}"
        return [*rows, ("Software", f"torch {self.torch_version}{cuda}")]


def describe_hardware(device: torch.device | str, *, num_devices: int = 1) -> Hardware:
    """The machine as `device` sees it."""
    device = torch.device(device)
    cpu, num_cpus = _cpu_name(), len(os.sched_getaffinity(0))
    if device.type != "cuda":
        return Hardware(cpu, 1, _memory_bytes(), cpu, num_cpus, torch.__version__, None)
    properties = torch.cuda.get_device_properties(device)
    return Hardware(
        device=properties.name,
        num_devices=num_devices,
        memory_bytes=properties.total_memory,
        cpu=cpu,
        num_cpus=num_cpus,
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda or "",
    )


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
