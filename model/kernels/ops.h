/* The kernels, written once over vectors of VL floats and compiled by kernels.c for each LEVEL. No include guards. */

#include "vectors.h"
#include "linear.h"
#include "norms.h"
#include "attention.h"
#include "scores.h"
#include "weights.h"
#include "filters.h"
#include "sampling.h"

static const struct level FN(level) = {
    CAT(LEVEL_NAME_, LEVEL), PANEL, TILE_ROWS,
    {FN(pack), FN(linear), FN(norm), FN(embed), FN(write_kv), FN(attention), FN(score), FN(sample), FN(pack_rows)},
    FN(sample_room),
};
