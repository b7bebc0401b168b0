from torch import Tensor


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `treedecode.ops.append_kv`."""
    page_size = k_pages.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        k_pages[page, offset] = k[token]
        v_pages[page, offset] = v[token]
