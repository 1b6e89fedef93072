#include "kernels.h"

#ifdef HAS_AMX_COMPILER

#define SIMD __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")))
#define HAS_BF16_DOT
#define HAS_AMX
#define SIMD_VECTORS "simd_avx512.h"
#include "build.h"

const Kernels kAmxBf16 = kBuild;

#endif
