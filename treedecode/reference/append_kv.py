"""Reference of append_kv."""

from torch import Tensor


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `treedecode.ops.append_kv`."""
    num_pages, page_size = k_pages.shape[:2]
    if any(slot >= num_pages * page_size for slot in slots.tolist()):
        raise ValueError(f"slots: expected values below {num_pages * page_size}, got {slots.tolist()}")
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        k_pages[page, offset] = k[token]
        v_pages[page, offset] = v[token]
