from tiny_model import model  # noqa: F401
