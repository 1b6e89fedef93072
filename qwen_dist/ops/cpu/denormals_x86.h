// Denormal numbers as zeros, as long as an object lives.

#pragma once

#include <immintrin.h>

namespace {

class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

}  // namespace
