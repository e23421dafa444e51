"""The compiled form. Only `choose` imports it: numba takes longer to import than a command takes."""

from engrampool_client.compute.forms import Form, Hashing
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec


class CompiledForm(Form):
    """`Form` by kernels, which run without the GIL."""

    compiled = True

    def hashing(self, spec: ModelSpec) -> Hashing:
        """As of `Form`."""
        return Hasher(spec)
