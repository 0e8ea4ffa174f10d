// ema_update for processors with AVX2.
#include "body.h"

void jk_ema_update_body_avx2(int64_t begin, int64_t end, void* context) {
  ema_update_body(begin, end, context);
}
