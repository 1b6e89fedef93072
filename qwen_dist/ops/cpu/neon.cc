#if defined(__aarch64__) && defined(__GNUC__)

#define SIMD
#define SIMD_VECTORS "simd_neon.h"
#include "build.h"

const Kernels kNeon = kBuild;

#endif
