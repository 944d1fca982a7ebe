"""One job, from flags to a report: dense and sparse from one seed."""

from .._moved import names_of

__getattr__ = names_of(__name__)
