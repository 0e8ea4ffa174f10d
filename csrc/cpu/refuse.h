// The sentence of a refusal. Include it from baseline translation units only, as dispatch.h.
#pragma once
#include <stdarg.h>
#include <stdio.h>

namespace jk {

// It stays valid until the next refusal on the same thread.
__attribute__((format(printf, 1, 2))) inline const char* refuse(const char* format, ...) {
  static thread_local char sentence[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  return sentence;
}

}  // namespace jk
