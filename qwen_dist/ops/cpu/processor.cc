// What processor this is, and which builds of the kernels it can run.

#include "kernels.h"

#ifdef HAS_AMX_COMPILER
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Linux gives a process the tile registers when it asks for them. It refuses where it does not know them.
bool RequestAmx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7's EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
#endif

bool IsIntel() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool is_intel = __builtin_cpu_is("intel");
  return is_intel;
#else
  return false;
#endif
}

// One bit for each build that this processor can run, in the order of BUILDS in ../native_library.py.
extern "C" int ProcessorBuilds() {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#ifdef HAS_AMX_COMPILER
  const bool has_amx = has_bf16 && RequestAmx();
#else
  const bool has_amx = false;
#endif
  return has_amx | has_bf16 << 1 | has_avx512 << 2 | has_avx2 << 3;
#elif defined(__aarch64__) && defined(__GNUC__)
  return 1 << 4;
#else
  return 0;
#endif
}
