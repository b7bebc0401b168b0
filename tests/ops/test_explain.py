"""`ops.explain`: unknown ops and devices."""

import pytest

from treedecode import ops


def test_unknown_ops_and_devices_are_refused():
    with pytest.raises(ValueError, match="no op 'sing'"):
        ops.explain("sing")
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'tpu'"):
        ops.explain("append_kv", "tpu")
