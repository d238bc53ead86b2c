"""The arrays that everything here works on."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
#: (n,) token ids.
Tokens: TypeAlias = npt.NDArray[np.int32]

#: Columns that a kernel works on at a time: 8 KB of accumulators stay in the L1 cache.
BLOCK: Final = 1024
