// Run-time choice of vector width, so that one binary suits every x86-64. A loop marked VITFAST_SIMD is
// compiled once per level by the compiler's own vectoriser and picked when the library is loaded. A kernel
// whose block shape depends on the level is a template, instantiated in one function per level
// (VITFAST_TARGET), and picked by `simd_level`.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VITFAST_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#define VITFAST_TARGET(level) __attribute__((target(level)))
#define VITFAST_SIMD_LEVELS 1
#else
#define VITFAST_SIMD
#endif

// The body of such a loop, where several share one: inlined, so that it is compiled with the clone's width.
#if defined(__GNUC__)
#define VITFAST_INLINE __attribute__((always_inline)) inline
#define VITFAST_INLINE_LAMBDA __attribute__((always_inline))
#else
#define VITFAST_INLINE inline
#define VITFAST_INLINE_LAMBDA
#endif

#if defined(__clang__)
#define VITFAST_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define VITFAST_COMPILER "gcc " __VERSION__
#else
#define VITFAST_COMPILER "unknown"
#endif

namespace vitfast {

enum class Simd { standard, avx2, avx512, avx512_vnni, avx512_bf16 };

constexpr const char* kSimdNames[] = {"default", "avx2", "avx512f", "avx512_vnni", "avx512_bf16"};

// The level of that name.
inline Simd simd_named(const std::string& name) {
  std::string names;
  for (size_t level = 0; level < std::size(kSimdNames); ++level) {
    if (name == kSimdNames[level]) return static_cast<Simd>(level);
    names += (level ? ", " : "") + std::string(kSimdNames[level]);
  }
  throw std::invalid_argument("a SIMD level must be one of " + names + ", got " + name);
}

// The highest level that `simd_level` gives: for tests, to run on one machine what others run.
inline std::atomic<Simd>& simd_limit() {
  static std::atomic<Simd> limit{[] {
    const char* name = std::getenv("VITFAST_SIMD");
    return name ? simd_named(name) : Simd::avx512_bf16;
  }()};
  return limit;
}

inline Simd simd_level() {
  Simd level = Simd::standard;
#ifdef VITFAST_SIMD_LEVELS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = Simd::avx2;
  if (__builtin_cpu_supports("avx512f")) level = Simd::avx512;
  const bool bytes = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (level == Simd::avx512 && bytes && __builtin_cpu_supports("avx512vnni")) level = Simd::avx512_vnni;
  if (level == Simd::avx512_vnni && __builtin_cpu_supports("avx512bf16")) level = Simd::avx512_bf16;
#endif
  return std::min(level, simd_limit().load());
}

}  // namespace vitfast
