"""Types of NumPy arrays that signatures name."""

import numpy as np
from numpy.typing import NDArray

IntArray = np.ndarray  # int32 or int64: row ids, token ids, lengths
FloatArray = NDArray[np.float64]
