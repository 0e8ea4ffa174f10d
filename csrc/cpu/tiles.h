// Every tile size of the CPU kernels of masked_attention, latent_rollout and sliced_gaussianity:
// one row for each instruction set, then what all of them share.
#pragma once
#include <stdint.h>

#include "../abi.h"

namespace jk {

struct Tiles {
  // Vector registers that hold the sums of a product: the others hold operands and constants.
  // latent_rollout: blocks of two vectors by accumulators / 2 rows.
  int accumulators;
  // masked_attention: blocks of so many rows by accumulators / rows vectors. A query tile is as
  // wide as a block.
  int attention_rows;
  // masked_attention: whether softmax is spread over the dot products beside it, in runs of so many
  // units, to fill the gaps they leave. 0: no registers are left for that, so it goes first.
  int attention_run;
  // masked_attention backward: query tiles whose P and dS meet dO and Q at once, and vectors of
  // channels of a block of that product.
  int backward_tiles, backward_vectors;
  // sliced_gaussianity: rows whose powers are in registers at once, five vectors each.
  int turned_rows;
};

// clang-format off
constexpr Tiles kTilesOf[JK_ISA_COUNT] = {  // accumulators of 16 registers, with AVX-512 of 32
    // accumulators  attention_rows  attention_run  backward_tiles  backward_vectors  turned_rows
    {             8,              4,             0,              4,                2,           2},  // PORTABLE
    {            12,              4,             0,              4,                2,           2},  // AVX2
    {            24,              8,             4,              2,                4,           4},  // AVX512
    {            24,              8,             2,              2,                4,           4},  // AVX512_BF16
};
// clang-format on

// masked_attention on every instruction set.
constexpr int64_t kTokenPad = 16;       // packed token counts: a multiple of vectors and row blocks
constexpr int64_t kRopePad = 32;        // channels of the rotation table: a multiple of vectors
constexpr int64_t kForwardBlock = 128;  // keys whose P is kept before it meets V
constexpr int64_t kBackwardBlock = 96;  // keys of a block: a multiple of row blocks
constexpr int kBackwardRows = 12;       // most rows of a block of dK and dV
constexpr int64_t kBackwardRun = 24;    // keys of a part of a block: a multiple of any row block
constexpr int64_t kPrefetchRows = 12;   // rows of a head lie a whole token apart, too far for the
                                        // hardware to fetch them ahead

// latent_rollout on every instruction set. Rows of a tile: few enough that its states and one
// matrix of a usual width (256) share the L2 cache and that usual row counts give every thread as
// many tiles as any other; a multiple of row blocks.
constexpr int64_t kTileRows = 48;
// A product goes over the depth in steps of at most so many units: a step's panel (16 KiB with 8
// lanes) stays in the L1 cache while all rows of the tile pass by.
constexpr int64_t kDepth = 256;

// sliced_gaussianity on every instruction set. Rows that one thread turns at a time, and the most
// pieces of rows whose sums are kept apart: both bound rounding errors, the second also memory.
constexpr int64_t kTurnedRows = 256;
constexpr int64_t kMostPieces = 64;
// Columns that one thread takes at a time: a cache line or more of each row.
constexpr int64_t kTurnedColumns = 64;

}  // namespace jk
