"""What numba compiles, for server and client alike: kernels that run without the GIL. To be imported where numba is."""

import sys

# In a process of somebody else's, who has settings of their own for it.
NUMBA_IS_OTHERS = "numba" in sys.modules
