from attention_fixtures import layout, make_qkv  # noqa: F401
from tiny_model import model  # noqa: F401
