#if defined(__x86_64__) && defined(__GNUC__)

#define SIMD __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))
#define HAS_BF16_DOT
#define SIMD_VECTORS "simd_avx512.h"
#include "build.h"

const Kernels kAvx512Bf16 = kBuild;

#endif
