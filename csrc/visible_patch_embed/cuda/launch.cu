// visible_patch_embed on a GPU: one launch for the embedding, one for the weight gradient of each
// piece of the rows, one for the clip's. No atomics, so results repeat bitwise.
#include "embed.cuh"
#include "gradients.cuh"

namespace jk::patches {
namespace {

const char* const kDtype = "visible_patch_embed: dtype must be float32, bfloat16 or float16.";
const char* const kTokens = "visible_patch_embed: clip must have fewer than 2^31 tokens.";
const char* const kSizes =
    "visible_patch_embed: weight must have at most 4194240 channels and "
    "numbers of a token.";

// Rows of a piece: enough to be worth a part of the sum, few enough for some blocks on every
// multiprocessor.
constexpr int64_t kFewestPieceRows = 256, kBlocks = 1024;

int64_t tiles(int64_t n) { return (n + kSide - 1) / kSide; }

int64_t numbers(const Params& p) { return p.channels * p.depth * p.high * p.wide; }

const char* refused(const Params& p) {
  if (p.batch * p.steps * p.lines * p.sites >= int64_t{1} << 31) return kTokens;
  return tiles(p.width) > 65535 || tiles(numbers(p)) > 65535 ? kSizes : nullptr;
}

template <class T>
const char* embed(const Params& p, void* stream) {
  JK_LAUNCH((visible_patch_embed_kernel<T>),
            dim3(unsigned(tiles(p.count)), unsigned(tiles(p.width))), dim3(kThreads), 0, stream, p);
  return launch_error();
}

template <class T>
const char* weight_gradient(const Params& p, void* stream) {
  JK_LAUNCH((visible_patch_embed_weight_gradient_kernel<T>),
            dim3(unsigned(tiles(p.width)), unsigned(tiles(numbers(p))), unsigned(p.pieces)),
            dim3(kThreads), 0, stream, p);
  return launch_error();
}

template <class T>
const char* scatter(const Params& p, void* stream) {
  JK_LAUNCH((visible_patch_embed_scatter_kernel<T>),
            dim3(unsigned(p.batch * p.steps * p.lines * p.sites)), dim3(kThreads), 0, stream, p);
  return launch_error();
}

}  // namespace
}  // namespace jk::patches

using namespace jk::patches;

JK_EXPORT int64_t jk_visible_patch_embed_cuda_piece_rows(int64_t count, int64_t width, int64_t k) {
  constexpr int64_t kStep = kTerms<jk::bfloat16>;
  const int64_t blocks = tiles(width) * tiles(k), pieces = (kBlocks + blocks - 1) / blocks;
  const int64_t wanted = (count + pieces - 1) / pieces;
  return wanted < kFewestPieceRows ? kFewestPieceRows : (wanted + kStep - 1) / kStep * kStep;
}

JK_EXPORT const char* jk_visible_patch_embed_cuda_embed(const Params* p, void* stream) {
  if (const char* wrong = refused(*p)) return wrong;
  if (p->count == 0) return nullptr;
  switch (p->dtype) {
    case JK_FLOAT32:
      return embed<float>(*p, stream);
    case JK_BFLOAT16:
      return embed<jk::bfloat16>(*p, stream);
    case JK_FLOAT16:
      return embed<jk::float16>(*p, stream);
    default:
      return kDtype;
  }
}

JK_EXPORT const char* jk_visible_patch_embed_cuda_weight_gradient(const Params* p, void* stream) {
  if (const char* wrong = refused(*p)) return wrong;
  switch (p->dtype) {
    case JK_FLOAT32:
      return weight_gradient<float>(*p, stream);
    case JK_BFLOAT16:
      return weight_gradient<jk::bfloat16>(*p, stream);
    case JK_FLOAT16:
      return weight_gradient<jk::float16>(*p, stream);
    default:
      return kDtype;
  }
}

JK_EXPORT const char* jk_visible_patch_embed_cuda_scatter(const Params* p, void* stream) {
  if (const char* wrong = refused(*p)) return wrong;
  if (p->batch * p->steps * p->lines * p->sites == 0) return nullptr;
  switch (p->clip_dtype) {
    case JK_FLOAT32:
      return scatter<float>(*p, stream);
    case JK_BFLOAT16:
      return scatter<jk::bfloat16>(*p, stream);
    case JK_FLOAT16:
      return scatter<jk::float16>(*p, stream);
    default:
      return kDtype;
  }
}
