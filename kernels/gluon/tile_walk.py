"""How a persistent program walks over the tiles of `common.tile_lists`: the n-th query tile, its keys, its rows."""

from . import LOADABLE

if LOADABLE:
    from . import gl, gluon

    @gluon.jit
    def tile_of(t, q_tiles, q_counts, map_index, query_width):
        """Batch-head, map, entry and whether there is such a query tile."""
        bh = t // query_width
        m = gl.load(map_index + bh).to(gl.int64)
        return bh, m, t % query_width, t % query_width < gl.load(q_counts + m)

    @gluon.jit
    def keys_of(m, entry, q_tiles, key_counts, Cq, query_width):
        """The map row of a query tile, how many of its key tiles are full, how many there are."""
        row = m * Cq + gl.load(q_tiles + (m * query_width + entry) * 3)
        return row, gl.load(key_counts + row * 2), gl.load(key_counts + row * 2 + 1)

    @gluon.jit
    def tokens_from(first, stop, order, stride, HAS_ORDER: gl.constexpr, layout: gl.constexpr):
        """Original indices of 64 rows from `first` on, laid out as `layout`, and which of them are before `stop`."""
        row = first + gl.arange(0, 64, layout)
        inside = row < stop
        token = row.to(gl.int64)
        if HAS_ORDER:
            token = gl.load(order + token * stride, mask=inside, other=0).to(gl.int64)
        return token, inside

    @gluon.jit
    def tokens_of(tile, FIRST: gl.constexpr, order, stride, HAS_PERMUTATION: gl.constexpr, layout: gl.constexpr):
        """Original indices of 64 rows of a query tile from its FIRST on, laid out as `layout`, and which rows there are."""
        offs_m = FIRST + gl.arange(0, 64, layout)
        token = (gl.load(tile + 1) + offs_m).to(gl.int64)
        inside = offs_m < gl.load(tile + 2)
        if HAS_PERMUTATION:
            token = gl.load(order + token * stride, mask=inside, other=0).to(gl.int64)
        return token, inside
