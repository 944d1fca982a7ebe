"""SageAttention: dense attention in fewer bits."""

from ..._moved import names_of

__getattr__ = names_of(__name__)
