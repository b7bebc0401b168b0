"""Block sizes of the attention kernel, by architecture."""

import functools
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """Block sizes and other constants of one compilation of the attention kernel."""

    heights: tuple[int, ...]  # blocks of packed rows, 16 to 128: a tile takes the smallest that holds it
    block_n: int  # keys multiplied at once; divides 64, the step of the ends of chunks
    num_warps: int
    num_stages: int  # of the pipeline that loads keys and values
    calls: bool  # each height is a function of its own, so that addresses of one do not take registers from another


# By architecture and largest head_dim: as large as the registers of a multiprocessor allow. Other capabilities take
# those of sm_80, which fit the 99 KB of shared memory that the smallest of them have.
_CONFIGS = {
    "sm_80": {64: Config((16, 32, 64, 128), 64, 8, 3, True), 128: Config((16, 32, 64, 128), 32, 8, 3, True),
              256: Config((16, 32, 64), 32, 8, 3, True)},
    "sm_90": {64: Config((16, 32, 64, 128), 64, 8, 3, True), 128: Config((16, 32, 64, 128), 64, 8, 3, True),
              256: Config((16, 32, 64), 32, 8, 3, True)},
    # acc is in tensor memory, which takes 64 or 128 rows and, in Triton, cannot be used in a function that is called.
    "sm_100": {64: Config((128,), 64, 8, 3, False), 128: Config((128,), 32, 8, 3, False),
               256: Config((64,), 32, 8, 1, False)},
    # A call would put registers on the stack. Loads are hidden by other waves rather than by a pipeline.
    "gfx": {64: Config((16, 128), 64, 8, 1, False), 128: Config((16, 64), 32, 4, 1, False),
            256: Config((16, 32), 32, 4, 1, False)},
}  # fmt: skip


def config(head_dim: int, dtype: torch.dtype, arch: str, max_rows: int = 128, is_plain: bool = True) -> Config:
    """Returns the configuration on `arch`, such as "sm_90" or "gfx942".

    Args:
        max_rows: the most packed rows that any tile has.
        is_plain: there is no window and no soft cap, which take registers.
    """
    if arch.startswith("gfx"):
        family = "gfx"
    elif arch.startswith(("sm_10", "sm_11")):  # those with tensor memory
        family = "sm_100"
    else:
        family = arch if arch in _CONFIGS else "sm_80"
    c = next(c for max_head_dim, c in _CONFIGS[family].items() if head_dim <= max_head_dim)
    if dtype == torch.float32:  # without tensor cores: for tests and comparisons, not for speed
        c = Config((16,), 16, 4 if family == "gfx" else 8, 1, False)
    elif family != "gfx" and not is_plain:
        heights = c.heights if head_dim <= 128 or family == "sm_100" else (16, 32)
        c = c._replace(heights=heights, block_n=32)
    lowest = 64 if family == "sm_100" and dtype != torch.float32 else 16
    highest = min(c.heights[-1], max(lowest, triton.next_power_of_2(max_rows)))
    return c._replace(heights=(*(height for height in c.heights if height < highest), highest))


@functools.cache
def arch_of(device: torch.device) -> str:
    """Returns the name of a device's architecture that `config` takes."""
    if device.type != "cuda":
        return "cpu"  # Triton's interpreter
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
