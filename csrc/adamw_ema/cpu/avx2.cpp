// adamw_ema for processors with AVX2.
#include "body.h"

void jk_adamw_ema_body_avx2(int64_t begin, int64_t end, void* context) {
  adamw_ema_body(begin, end, context);
}
