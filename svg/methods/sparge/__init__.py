"""SpargeAttn: blocks of neighbouring tokens, predicted by their means."""

from ..._moved import names_of

__getattr__ = names_of(__name__)
