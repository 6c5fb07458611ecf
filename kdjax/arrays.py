"""Arrays and numbers as public functions take them; the arrays that they return are JAX's."""

import numpy as np
from jaxtyping import Array, Float

AnyArray = Array | np.ndarray
"""Of JAX or of NumPy."""
Number = float | Float[Array, ""]
"""Fixed, or an array, of a schedule for instance."""
