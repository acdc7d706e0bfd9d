// Which level of the instruction set this processor has. SPARSEZOO_HAS_V3, _V4 and _V4_BF16: levels that were compiled.
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "loops.h"

namespace sparsezoo {
namespace {

const Loops* best() {
#if defined(__x86_64__)
  // A lower level for tests: the results of all must agree.
  const char* asked = std::getenv("SPARSEZOO_NATIVE_LEVEL");
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(SPARSEZOO_HAS_V4_BF16)
  const bool v4_bf16 = v4 && __builtin_cpu_supports("avx512bf16");
  if (v4_bf16 && (!asked || !std::strcmp(asked, "v4_bf16"))) return loops_v4_bf16();
#endif
#if defined(SPARSEZOO_HAS_V4)
  if (v4 && (!asked || !std::strncmp(asked, "v4", 2))) return loops_v4();
#endif
#if defined(SPARSEZOO_HAS_V3)
  if (v3 && (!asked || std::strcmp(asked, "default"))) return loops_v3();
#endif
  (void)v3, (void)v4, (void)asked;
#endif
  return loops_default();
}

}  // namespace

const Loops& loops() {
  static const Loops* const chosen = best();
  return *chosen;
}

bool has_matrix_units() {
#if defined(__x86_64__)
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & 1u << 22;  // AMX-BF16
#else
  return false;
#endif
}

}  // namespace sparsezoo
