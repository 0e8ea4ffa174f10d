// The product at the heart of every kernel here: kTile rows of hidden units times a matrix, by one
// block of 256 threads.
#pragma once
#include "weights.cuh"

namespace jk::rollout {
namespace {

// Which elements of a kTile x kBlock result a thread holds: number i of half b is at (row(i),
// column(b, i)).
template <class T>
struct Place {
  static constexpr int kRows = sizeof(T) == 2 ? 2 : 4;  // that a thread sees
  JK_DEVICE static int which_row(int i) { return sizeof(T) == 2 ? i >> 1 : i; }
  JK_DEVICE static int row(int i) {
    return sizeof(T) == 2 ? (lane_id() >> 2) + 8 * (i >> 1) : (lane_id() >> 3) + 4 * i;
  }
  JK_DEVICE static int column(int b, int i) {
    return 8 * b + (sizeof(T) == 2 ? (lane_id() & 3) * 2 + (i & 1) : lane_id() & 7);
  }
};

// The left side of one step of a product: kTerms terms of every row, as this lane needs them.
template <class T>
struct Left {
  uint32_t a[4];
  JK_DEVICE void load(const Tile<T>& tile, int term) {
    const int lane = lane_id();
    ldmatrix_x4(a, &tile(lane & 15, term + (lane >> 4) * 8));
  }
};
template <>
struct Left<float> {
  // Four rows by eight terms would take 32 registers: each half is read when it is needed.
  const float* at;
  int rows_apart;
  JK_DEVICE void load(const Tile<float>& tile, int term) {
    at = &tile(Place<float>::row(0), term);
    rows_apart = 4 * tile.stride;
  }
};

// acc += left * one tile of a matrix, whose lines are `stride` numbers apart; in a slot of the ring
// they are packed.
template <bool kTransposed, bool kSlot, class T>
JK_DEVICE void add_tile(float (&acc)[2][4], const Left<T>& left, const T* tile, int stride) {
  const int lane = lane_id(), high = lane >> 4, middle = lane >> 3 & 1;
  const int line = (lane & 7) + 8 * (kTransposed ? middle : high),
            chunk = kTransposed ? high : middle;
  const int swapped = kSlot ? chunk ^ (line >> 2 & 1) : chunk;
  const T* at = tile + line * (kSlot ? kBlock : stride) + swapped * 8;
  uint32_t b[4];
  if (kTransposed) {
    ldmatrix_x4_trans(b, at);
  } else {
    ldmatrix_x4(b, at);
  }
  mma_16816<T>(acc[0], left.a, b[0], b[1]);
  mma_16816<T>(acc[1], left.a, b[2], b[3]);
}

template <bool kTransposed, bool kSlot>
JK_DEVICE void add_tile(float (&acc)[2][4], const Left<float>& left, const float* tile,
                        int stride) {
  const int column = lane_id() & 7, swapped = kSlot ? column >> 2 & 1 : 0;
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    float4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[i] = *reinterpret_cast<const float4*>(left.at + i * left.rows_apart + 4 * half);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float4 w;
      if (kTransposed) {
        const float* at = tile + 4 * half * (kSlot ? kBlock : stride) + column + 8 * b;
        const int step = kSlot ? kBlock : stride;
        w = make_float4(at[0], at[step], at[2 * step], at[3 * step]);
      } else {
        w = *reinterpret_cast<const float4*>(
            tile + (column + 8 * b) * (kSlot ? kTerms<float> : stride) + 4 * (half ^ swapped));
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        acc[b][i] =
            fmaf(x[i].w, w.w, fmaf(x[i].z, w.z, fmaf(x[i].y, w.y, fmaf(x[i].x, w.x, acc[b][i]))));
      }
    }
  }
}

// The last of kTiles sums of a pass goes to acc[kLast].
template <int kTiles, int kLast, bool kTransposed, class T, int kSums>
JK_DEVICE void product_kept(const Tile<T>& left, const T* kept, int at, int to_tile, int stride,
                            int terms, float (&acc)[kSums][2][4]) {
  const int to_term = kTerms<T> * (kTransposed ? stride : 1);
#pragma unroll(sizeof(T) == 2 && kTiles < 3 ? 2 : 1)
  for (int k = 0; k < terms; k += kTerms<T>) {
    Left<T> a;
    a.load(left, k);
#pragma unroll
    for (int j = 0; j < kTiles; j++)
      add_tile<kTransposed, false>(acc[j + 1 == kTiles ? kLast : j], a, kept + (at + j * to_tile),
                                   stride);
    at += to_term;
  }
}

template <int kLast, bool kTransposed, class T, int kTiles, int kSums>
JK_DEVICE void product(Ring<T>& ring, const Tile<T>& left, const View<T, kTiles>& view, int first,
                       float (&acc)[kSums][2][4]) {
  const Weights<T>& weights = view.weights;
  const int tiles = view.tiles(first);
  if (weights.is_kept) {
    const int column = first + int(threadIdx.x >> 5) * kBlock;
    const int at = column * (kTransposed ? 1 : weights.stride);
    const int to_tile = kTransposed ? view.columns_apart() : view.lines_apart() * weights.stride;
    if (tiles == kTiles) {
      product_kept<kTiles, kLast, kTransposed>(left, weights.kept, at, to_tile, weights.stride,
                                               view.terms, acc);
    } else if (kTiles == 2 && tiles == 1) {
      product_kept<1, 0, kTransposed>(left, weights.kept, at, to_tile, weights.stride, view.terms,
                                      acc);
    }
    return;
  }
  if (tiles == 0) return;
#pragma unroll 1
  for (int k = 0; k < view.terms; k += kTerms<T>) {
    Left<T> a;
    a.load(left, k);
#pragma unroll
    for (int j = 0; j < kTiles; j++)
      if (j < tiles)
        add_tile<kTransposed, true>(acc[j + 1 == kTiles ? kLast : j], a, ring.take(), 0);
  }
}

// acc += left * the columns of a pass, which the ring must have begun if the matrix streams. A warp
// needs no barrier in here.
template <int kLast, class T, int kTiles, int kSums>
JK_DEVICE void add_product(Ring<T>& ring, const Tile<T>& left, const View<T, kTiles>& view,
                           int first, float (&acc)[kSums][2][4]) {
  if (view.transposed) {
    product<kLast, true>(ring, left, view, first, acc);
  } else {
    product<kLast, false>(ring, left, view, first, acc);
  }
}

// finish(row, column, value) for every element of left times a matrix, rows 0 .. rows - 1, each by
// the thread that has it. ahead() is called when the last tile has been taken, to begin the next
// product while this one is finished. The tile that finish writes must not be `left`: other warps
// may still read it, until the next barrier.
template <class T, class Ahead, class Finish>
JK_DEVICE void multiply(Ring<T>& ring, int rows, const Tile<T>& left, const View<T>& view,
                        const Ahead& ahead, const Finish& finish) {
  constexpr int kTiles = kTilesOfPass<T>;
  for (int first = 0; first < view.columns; first += View<T>::kPass) {
    float acc[kTiles][2][4] = {};
    add_product<kTiles - 1>(ring, left, view, first, acc);
    if (first + View<T>::kPass < view.columns) {
      ring.begin(view, first + View<T>::kPass);
    } else {
      ahead();
    }
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int b = 0; b < 2; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = Place<T>::row(i), column = first +
                                                     (j * kWarps + int(threadIdx.x >> 5)) * kBlock +
                                                     Place<T>::column(b, i);
          if (row < rows && column < view.columns) finish(row, column, acc[j][b][i]);
        }
  }
}

// gelu(x) = x Phi(x) and its derivatives, exact (erf) form.
JK_DEVICE float phi_of(float x) { return 0.3989422804f * expf(-0.5f * x * x); }
JK_DEVICE float cumulative(float x) { return 0.5f * (1.f + erff(x * 0.7071067812f)); }
JK_DEVICE float gelu(float x) { return x * cumulative(x); }
JK_DEVICE float gelu_slope(float x) { return cumulative(x) + x * phi_of(x); }
JK_DEVICE float gelu_curvature(float x) { return (2.f - x * x) * phi_of(x); }

}  // namespace
}  // namespace jk::rollout
