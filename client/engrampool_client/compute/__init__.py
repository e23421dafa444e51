"""What a lookup computes, of arrays alone, in two forms that give the same: by numpy, and compiled where numba is."""
