"""Names the columns of a flat plan's `counts` and of its rows of chunks, as csrc/cpu/plan_tree.h lays them out."""

import triton.language as tl

NUM_CHUNKS, NUM_PARTS, UNIQUE_TOKENS, PATH_TOKENS, PAGE_SIZE, NUM_TILES = (tl.constexpr(i) for i in range(6))
NUM_COUNTS = 6

ROW_BEGIN, ROW_END, TOKEN_BEGIN, TOKEN_END, PART, TILE_BEGIN = (tl.constexpr(i) for i in range(6))
COLUMNS = tl.constexpr(6)

TILE_ROWS = tl.constexpr(128)  # the most packed rows of a work tile
