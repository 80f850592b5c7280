"""Programmatic dependent launch: a kernel is launched, and does what depends on nothing, while the one in front runs.

What is launched so has to wait (`gdc_wait`) before it reads what an earlier kernel writes or writes what one reads.
Behind the wait all earlier kernels have ended: the one in front of it has waited itself before it ended. A kernel says
early that the next one may begin (`gdc_launch_dependents`): before its own wait if that one reads nothing but constants
before it waits, like the NF4 products, behind it otherwise.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache

import torch

_MAX_EARLY_PROGRAMS = 16


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a device can: compute capability 9.0 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def early_options(device: torch.device, num_programs: int) -> dict[str, bool]:
    """Of the launch of a kernel that takes `EARLY` and waits where that is set. num_programs: of its grid.

    A product fills all registers of most processors, so that what starts before it has ended crowds on those few that
    it left free, and stays there: a few programs gain by it, many lose. Those start behind it, and let the next product
    begin early all the same.
    """
    if not launches_early(device):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": num_programs <= _MAX_EARLY_PROGRAMS}
