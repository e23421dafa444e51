"""Which servers there are, which of them is asked, and by which version of the model."""
