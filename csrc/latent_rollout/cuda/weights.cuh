// Matrices of a product: kept in shared memory for the whole launch, or streamed through a ring of
// each warp.
#pragma once
#include "shared.cuh"

namespace jk::rollout {
namespace {

// A matrix in memory, and its copy in shared memory if it is kept.
template <class T>
struct Weights {
  const T* memory;
  int64_t pitch, unit;  // from line to line, and from number to number of a line
  int length;           // numbers of a line
  int piece;  // bytes of its asynchronous copies: 16 or 4, and 0 where 16-bit numbers take plain
              // loads
  bool is_kept = false;
  T* kept = nullptr;  // the copy; never compared with NULL, so that the compiler sees an address of
                      // shared memory
  int stride = 0;     // of the copy

  // The matrix from a line, or from a number of every line, on.
  JK_DEVICE Weights lines_from(int64_t line) const {
    Weights rest = *this;
    rest.memory += line * pitch;
    rest.kept += line * stride;
    return rest;
  }
  JK_DEVICE Weights numbers_from(int number) const {
    Weights rest = *this;
    rest.memory += number;
    rest.kept += number;
    return rest;
  }
};

// Pieces never reach over the end of a line: its length is a whole number of them.
template <class T>
JK_DEVICE Weights<T> weights_of(const void* memory, int64_t pitch, int64_t unit, int64_t length) {
  const uint64_t together = reinterpret_cast<uint64_t>(memory) | uint64_t(pitch) * sizeof(T) |
                            uint64_t(length) * sizeof(T);
  const int piece = unit == 1 && together % 16 == 0                      ? 16
                    : sizeof(T) == 4 || (unit == 1 && together % 4 == 0) ? 4
                                                                         : 0;
  return {static_cast<const T*>(memory), pitch, unit, int(length), piece};
}

// 16 bytes to shared memory, zeros from number `inside` on.
template <class T>
JK_DEVICE void copy_chunk(T* to, const T* from, int inside, int piece, int64_t unit) {
  if (piece == 16) {
    cp_async_16(to, from, inside > 0);
  } else if (sizeof(T) == 4 || piece == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int number = i * kChunk<T> / 4;
      cp_async_4(to + number, from + number * unit, number < inside);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; i++) to[i] = i < inside ? from[i * unit] : zero_of<T>();
  }
}

// A contiguous matrix, and the start of the copy that keeps it if it is placed so: the block waits
// with `await_kept`.
template <class T>
JK_DEVICE Weights<T> weights_of(Arena& arena, const void* memory, const Extent& extent, bool kept) {
  Weights<T> weights = weights_of<T>(memory, extent.length, 1, extent.length);
  weights.is_kept = kept;
  weights.kept = arena.take<T>(kept ? kept_bytes<T>(extent) : 0);
  weights.stride = int(operand_stride<T>(extent.length));
  const int lines = int(extent.gates * extent.lines),
            all_lines = kept ? int(extent.all_lines()) : 0;
  const int chunks = int(round_up(extent.length, kBlock)) / kChunk<T>;
  each(all_lines, chunks, [&](int line, int chunk) {
    const int at = chunk * kChunk<T>;
    copy_chunk(weights.kept + line * weights.stride + at,
               weights.memory + line * weights.pitch + at, line < lines ? weights.length - at : 0,
               weights.piece, 1);
  });
  cp_async_commit();
  return weights;
}
// A barrier must follow before a product.
JK_DEVICE void await_kept() { cp_async_wait<0>(); }

// Blocks of columns that a warp multiplies by in one pass. Two in 16 bits, so that an ldmatrix of
// the left side feeds four mma; in 32 bits one already keeps the multipliers busy, and two would
// not fit the registers.
template <class T>
constexpr int kTilesOfPass = sizeof(T) == 2 ? 2 : 1;

// What a product reads of a matrix: element (column, term) is number `term` of line `column`, or
// the reverse if `transposed`. A pass covers kTiles blocks of kBlock columns of each warp: 128
// columns apart, or, with three, the same columns of three gates.
template <class T, int kTiles = kTilesOfPass<T>>
struct View {
  Weights<T> weights;
  bool transposed;
  int terms, columns;

  static constexpr int kPass = (kTiles == 3 ? 1 : kTiles) * kWarps * kBlock;
  // From block to block, in columns and in lines of a matrix.
  JK_DEVICE int columns_apart() const { return kTiles == 3 ? 0 : kWarps * kBlock; }
  JK_DEVICE int lines_apart() const { return kTiles == 3 ? columns : kWarps * kBlock; }
  // Blocks of this warp in the pass from column `first` on.
  JK_DEVICE int tiles(int first) const {
    const int left = columns - first - int(threadIdx.x >> 5) * kBlock;
    return left <= 0 ? 0 : kTiles == 2 && left <= kWarps * kBlock ? 1 : kTiles;
  }
};

// The slots of one warp. No other warp reads its columns of a matrix, so filling and reading need
// no barrier of the block.
template <class T>
struct Ring {
  T* slots;
  int count, write = 0, read = 0;
  // Where this lane's chunk of the next tile comes from, and goes to in a slot.
  const T* from = nullptr;
  int64_t unit = 1, to_term = 0, to_tile = 0;
  int piece = 0, place = 0, columns_left = 0, terms_left = 0, apart = 0, steps = 0, tile = 0,
      tiles = 0;
  bool transposed = false;

  JK_DEVICE Ring(Arena& arena, int slots_of_a_warp)
      : slots(arena.take<T>(ring_bytes(slots_of_a_warp)) +
              int(threadIdx.x >> 5) * slots_of_a_warp * kNumbers),
        count(slots_of_a_warp) {}

  // Starts to stream the pass from column `first` on, unless the matrix is kept. All tiles begun
  // before must have been taken.
  template <int kTiles>
  JK_DEVICE void begin(const View<T, kTiles>& view, int first) {
    const Weights<T>& weights = view.weights;
    if (weights.is_kept) return;
    transposed = view.transposed;
    const int lane = lane_id(), of_a_line = transposed ? kBlock / kChunk<T> : 2;
    const int line = lane / of_a_line, along = lane % of_a_line * kChunk<T>;
    const int column = first + int(threadIdx.x >> 5) * kBlock + (transposed ? along : line),
              term = transposed ? line : along;
    const int64_t to_column = transposed ? weights.unit : weights.pitch,
                  to_next = transposed ? weights.pitch : weights.unit;
    // Lines of 32 bytes exchange their chunks every four lines, so that eight of them lie in
    // different banks.
    place = of_a_line == 2 ? (lane ^ (lane >> 3 & 1)) * kChunk<T> : lane * kChunk<T>;
    unit = weights.unit;
    piece = weights.piece;
    from = weights.memory + column * to_column + term * to_next;
    to_term = kTerms<T> * to_next;
    to_tile = transposed ? view.columns_apart() * unit : view.lines_apart() * weights.pitch;
    columns_left = view.columns - column;
    terms_left = view.terms - term;
    apart = view.columns_apart();
    tiles = view.tiles(first);
    steps = tiles == 0 ? 0 : (view.terms + kTerms<T> - 1) / kTerms<T>;
    tile = write = read = 0;
    __syncwarp();  // the slots may still be read
#pragma unroll 1
    for (int i = 1; i < count; i++) fill();
  }

  // The next tile; its slot stays until the next call.
  JK_DEVICE const T* take() {
    if (count == kManySlots) {
      cp_async_wait<kManySlots - 2>();
    } else {
      cp_async_wait<kFewSlots - 2>();
    }
    __syncwarp();  // every lane's chunk is there, and the slot before has been read
    fill();
    const T* taken = slots + read * kNumbers;
    read = after(read);
    return taken;
  }

 private:
  static constexpr int kNumbers = kSlotBytes / int(sizeof(T));
  JK_DEVICE int after(int slot) const { return slot + 1 == count ? 0 : slot + 1; }

  // One group of copies whether or not a tile is left: `take` counts groups.
  JK_DEVICE void fill() {
    if (steps > 0) {
      const int columns = columns_left - tile * apart;
      const int inside = transposed ? (terms_left > 0 ? columns : 0) : columns > 0 ? terms_left : 0;
      copy_chunk(slots + write * kNumbers + place, from + tile * to_tile, inside, piece, unit);
      // Plain loads branch by lane, and the ldmatrix that follows wants the warp together.
      if (sizeof(T) == 2 && piece == 0) __syncwarp();
      if (++tile == tiles) {
        tile = 0;
        steps--;
        terms_left -= kTerms<T>;
        from += to_term;
      }
    }
    cp_async_commit();
    write = after(write);
  }
};

}  // namespace
}  // namespace jk::rollout
