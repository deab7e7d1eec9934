// Run-time choice of vector width. A loop marked VITFAST_SIMD is compiled once per level by the
// compiler's own vectoriser and picked when the library is loaded, so one binary suits every x86-64.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VITFAST_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#define VITFAST_SIMD_CLONES 1
#else
#define VITFAST_SIMD
#endif

// The body of such a loop, where several share one: inlined, so that it is compiled with the clone's width.
#if defined(__GNUC__)
#define VITFAST_INLINE __attribute__((always_inline)) inline
#else
#define VITFAST_INLINE inline
#endif

#if defined(__clang__)
#define VITFAST_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define VITFAST_COMPILER "gcc " __VERSION__
#else
#define VITFAST_COMPILER "unknown"
#endif

namespace vitfast {

// The level that loops marked VITFAST_SIMD run at on this machine.
inline const char* simd_level() {
#ifdef VITFAST_SIMD_CLONES
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "default";
}

}  // namespace vitfast
