"""The engrampool client: asks a pool for embedding rows ahead of the layers that read them."""
