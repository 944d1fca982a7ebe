from attention_fixtures import layout, make_mask, make_qkv, make_state, masked_attention, token_map  # noqa: F401
