// Instructions of one lane: integers, fp32, conversions, predicates.
#pragma once

#include "machine.h"

namespace ptx {

template <typename F>
inline void for_lanes(Lanes lanes, F f) {
  if (lanes == kAll) {
    for (int i = 0; i < kLanes; ++i) f(i);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      if (lanes >> i & 1) f(i);
    }
  }
}

template <typename To, typename A, typename F>
Then unary(Warp& w, const int32_t* o, Lanes lanes, F f) {
  To* to = w.reg<To>(o[0]);
  const A* a = w.reg<A>(o[1]);
  for_lanes(lanes, [&](int i) { to[i] = f(a[i]); });
  return Then::next;
}
template <typename To, typename A, typename B, typename F>
Then binary(Warp& w, const int32_t* o, Lanes lanes, F f) {
  To* to = w.reg<To>(o[0]);
  const A* a = w.reg<A>(o[1]);
  const B* b = w.reg<B>(o[2]);
  for_lanes(lanes, [&](int i) { to[i] = f(a[i], b[i]); });
  return Then::next;
}
template <typename To, typename A, typename B, typename C, typename F>
Then ternary(Warp& w, const int32_t* o, Lanes lanes, F f) {
  To* to = w.reg<To>(o[0]);
  const A* a = w.reg<A>(o[1]);
  const B* b = w.reg<B>(o[2]);
  const C* c = w.reg<C>(o[3]);
  for_lanes(lanes, [&](int i) { to[i] = f(a[i], b[i], c[i]); });
  return Then::next;
}
template <typename T, typename F>
Then compare(Warp& w, const int32_t* o, Lanes lanes, F f) {
  const T* a = w.reg<T>(o[1]);
  const T* b = w.reg<T>(o[2]);
  Lanes result = 0;
  for (int i = 0; i < kLanes; ++i) result |= static_cast<Lanes>(f(a[i], b[i])) << i;
  Lanes& to = *w.reg<Lanes>(o[0]);
  to = (to & ~lanes) | (result & lanes);
  return Then::next;
}
template <typename F>
Then logic(Warp& w, const int32_t* o, Lanes lanes, F f) {
  Lanes& to = *w.reg<Lanes>(o[0]);
  to = (to & ~lanes) | (f(w.predicate(o[1]), w.predicate(o[2])) & lanes);
  return Then::next;
}
template <typename T>
Then select(Warp& w, const int32_t* o, Lanes lanes) {
  T* to = w.reg<T>(o[0]);
  const T *a = w.reg<T>(o[1]), *b = w.reg<T>(o[2]);
  const Lanes p = w.predicate(o[3]);
  for_lanes(lanes, [&](int i) { to[i] = p >> i & 1 ? a[i] : b[i]; });
  return Then::next;
}
// A number of type From in a register that may be wider, and a result that may be narrower than its own.
template <typename To, typename From, typename F>
Then convert(Warp& w, const int32_t* o, Lanes lanes, F f) {
  int to_shift, from_shift;
  uint8_t* to = w.bytes(o[0], to_shift);
  const uint8_t* from = w.bytes(o[1], from_shift);
  for_lanes(lanes, [&](int i) {
    From x;
    std::memcpy(&x, from + (i << from_shift), sizeof(x));
    const To result = f(x);
    const int64_t wide = std::is_signed<To>::value ? static_cast<int64_t>(result) : static_cast<uint64_t>(result);
    std::memcpy(to + (i << to_shift), &wide, size_t{1} << to_shift);
  });
  return Then::next;
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float flushed(float x) { return as_bits(x) & 0x7f800000 ? x : as_float(as_bits(x) & 0x80000000); }
using emulation::from_bf16;
inline uint32_t pair(uint16_t high, uint16_t low) { return static_cast<uint32_t>(high) << 16 | low; }

// What the hardware's approximations promise and no more: the last bits of an exact result are cut.
inline float with_error(float x, int bits) {  // of a relative error of 2^-bits
  return std::isfinite(x) ? as_float(as_bits(x) & ~0u << (23 - bits)) : x;
}

template <typename To>
To saturated(float x) {
  if (std::isnan(x)) return 0;
  const double low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  return static_cast<To>(std::min(std::max(static_cast<double>(x), low), high));
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t how) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = how >> 4 * i & 15;
    uint32_t byte = both >> 8 * (pick & 7) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
template <typename T>
T extracted(T x, uint32_t at, uint32_t count) {
  constexpr uint32_t bits = 8 * sizeof(T);
  at &= 255, count &= 255;
  if (!count) return 0;
  using U = std::make_unsigned_t<T>;
  const uint32_t top = std::min(at + count, bits) - 1;
  U result = at >= bits ? 0 : static_cast<U>(x) >> at;
  const U mask = count >= bits ? ~U{0} : (U{1} << count) - 1;
  result &= mask;
  if (std::is_signed<T>::value && (static_cast<U>(x) >> top & 1)) result |= ~mask;
  return static_cast<T>(result);
}

#define OP1(name, To, A, expression)                                                                  \
  all.push_back({name, [](Warp& w, const int32_t* o, Lanes lanes) {                                   \
                   return unary<To, A>(w, o, lanes, [](A a) { return static_cast<To>(expression); }); \
                 }})
#define OP2(name, To, A, B, expression)                                                                        \
  all.push_back({name, [](Warp& w, const int32_t* o, Lanes lanes) {                                            \
                   return binary<To, A, B>(w, o, lanes, [](A a, B b) { return static_cast<To>(expression); }); \
                 }})
#define OP3(name, To, A, B, C, expression)                                                                 \
  all.push_back({name, [](Warp& w, const int32_t* o, Lanes lanes) {                                        \
                   return ternary<To, A, B, C>(w, o, lanes,                                                \
                                               [](A a, B b, C c) { return static_cast<To>(expression); }); \
                 }})
#define COMPARE(name, T, expression)                                                      \
  all.push_back({name, [](Warp& w, const int32_t* o, Lanes lanes) {                       \
                   return compare<T>(w, o, lanes, [](T a, T b) { return (expression); }); \
                 }})
#define LOGIC(name, expression)                                                                                    \
  all.push_back({name, [](Warp& w, const int32_t* o, Lanes lanes) {                                                \
                   return logic(w, o, lanes, [](Lanes a, Lanes b) { return static_cast<void>(b), (expression); }); \
                 }})
#define CONVERT(name, To, From, expression)                                                                   \
  all.push_back({name, [](Warp& w, const int32_t* o, Lanes lanes) {                                           \
                   return convert<To, From>(w, o, lanes, [](From a) { return static_cast<To>(expression); }); \
                 }})

#define INTEGER(S, U, bits)                                                              \
  OP2("add.s" bits, U, U, U, a + b);                                                     \
  OP2("add.u" bits, U, U, U, a + b);                                                     \
  OP2("sub.s" bits, U, U, U, a - b);                                                     \
  OP2("sub.u" bits, U, U, U, a - b);                                                     \
  OP2("mul.lo.s" bits, U, U, U, uint64_t{a} * b);                                        \
  OP2("mul.lo.u" bits, U, U, U, uint64_t{a} * b);                                        \
  OP3("mad.lo.s" bits, U, U, U, U, uint64_t{a} * b + c);                                 \
  OP3("mad.lo.u" bits, U, U, U, U, uint64_t{a} * b + c);                                 \
  OP2("div.s" bits, S, S, S, b ? int64_t{a} / b : -1);                                   \
  OP2("div.u" bits, U, U, U, b ? a / b : ~U{0});                                         \
  OP2("rem.s" bits, S, S, S, b ? int64_t{a} % b : a);                                    \
  OP2("rem.u" bits, U, U, U, b ? a % b : a);                                             \
  OP2("min.s" bits, S, S, S, std::min(a, b));                                            \
  OP2("min.u" bits, U, U, U, std::min(a, b));                                            \
  OP2("max.s" bits, S, S, S, std::max(a, b));                                            \
  OP2("max.u" bits, U, U, U, std::max(a, b));                                            \
  OP1("neg.s" bits, U, U, 0 - a);                                                        \
  OP1("abs.s" bits, U, S, a < 0 ? 0 - static_cast<U>(a) : static_cast<U>(a));            \
  OP2("and.b" bits, U, U, U, a& b);                                                      \
  OP2("or.b" bits, U, U, U, a | b);                                                      \
  OP2("xor.b" bits, U, U, U, a ^ b);                                                     \
  OP1("not.b" bits, U, U, ~a);                                                           \
  OP2("shl.b" bits, U, U, uint32_t, b >= 8 * sizeof(U) ? U{0} : static_cast<U>(a << b)); \
  OP2("shr.u" bits, U, U, uint32_t, b >= 8 * sizeof(U) ? U{0} : static_cast<U>(a >> b)); \
  OP2("shr.b" bits, U, U, uint32_t, b >= 8 * sizeof(U) ? U{0} : static_cast<U>(a >> b)); \
  OP2("shr.s" bits, S, S, uint32_t, a >> std::min<uint32_t>(b, 8 * sizeof(U) - 1));      \
  OP1("mov.b" bits, U, U, a);                                                            \
  OP1("mov.u" bits, U, U, a);                                                            \
  OP1("mov.s" bits, U, U, a);                                                            \
  all.push_back({"selp.b" bits, select<U>});                                             \
  all.push_back({"selp.s" bits, select<U>});                                             \
  all.push_back({"selp.u" bits, select<U>});                                             \
  COMPARE("setp.eq.b" bits, U, a == b);                                                  \
  COMPARE("setp.ne.b" bits, U, a != b);                                                  \
  COMPARE("setp.eq.s" bits, U, a == b);                                                  \
  COMPARE("setp.ne.s" bits, U, a != b);                                                  \
  COMPARE("setp.eq.u" bits, U, a == b);                                                  \
  COMPARE("setp.ne.u" bits, U, a != b);                                                  \
  COMPARE("setp.lt.s" bits, S, a < b);                                                   \
  COMPARE("setp.le.s" bits, S, a <= b);                                                  \
  COMPARE("setp.gt.s" bits, S, a > b);                                                   \
  COMPARE("setp.ge.s" bits, S, a >= b);                                                  \
  COMPARE("setp.lt.u" bits, U, a < b);                                                   \
  COMPARE("setp.le.u" bits, U, a <= b);                                                  \
  COMPARE("setp.gt.u" bits, U, a > b);                                                   \
  COMPARE("setp.ge.u" bits, U, a >= b)

inline void add_arithmetic(std::vector<Op>& all) {
  INTEGER(int16_t, uint16_t, "16");
  INTEGER(int32_t, uint32_t, "32");
  INTEGER(int64_t, uint64_t, "64");
  OP2("mul.wide.s16", int32_t, int16_t, int16_t, int32_t{a} * b);
  OP2("mul.wide.u16", uint32_t, uint16_t, uint16_t, uint32_t{a} * b);
  OP2("mul.wide.s32", int64_t, int32_t, int32_t, int64_t{a} * b);
  OP2("mul.wide.u32", uint64_t, uint32_t, uint32_t, uint64_t{a} * b);
  OP3("mad.wide.s32", uint64_t, int32_t, int32_t, uint64_t, static_cast<uint64_t>(int64_t{a} * b) + c);
  OP3("mad.wide.u32", uint64_t, uint32_t, uint32_t, uint64_t, uint64_t{a} * b + c);
  OP2("mul.hi.u16", uint16_t, uint16_t, uint16_t, uint32_t{a} * b >> 16);
  OP2("mul.hi.s32", int32_t, int32_t, int32_t, int64_t{a} * b >> 32);
  OP2("mul.hi.u32", uint32_t, uint32_t, uint32_t, uint64_t{a} * b >> 32);
  OP2("mul.hi.s64", int64_t, int64_t, int64_t, static_cast<__int128>(a) * b >> 64);
  OP2("mul.hi.u64", uint64_t, uint64_t, uint64_t, static_cast<unsigned __int128>(a) * b >> 64);
  OP3("bfe.u32", uint32_t, uint32_t, uint32_t, uint32_t, extracted(a, b, c));
  OP3("bfe.s32", int32_t, int32_t, uint32_t, uint32_t, extracted(a, b, c));
  OP3("bfe.u64", uint64_t, uint64_t, uint32_t, uint32_t, extracted(a, b, c));
  OP3("prmt.b32", uint32_t, uint32_t, uint32_t, uint32_t, permute(a, b, c));
  OP1("popc.b32", uint32_t, uint32_t, __builtin_popcount(a));
  OP1("clz.b32", uint32_t, uint32_t, a ? __builtin_clz(a) : 32);
  OP3("shf.l.wrap.b32", uint32_t, uint32_t, uint32_t, uint32_t, ((uint64_t{b} << 32 | a) << (c & 31)) >> 32);
  OP3("shf.r.wrap.b32", uint32_t, uint32_t, uint32_t, uint32_t, (uint64_t{b} << 32 | a) >> (c & 31));

  OP2("add.f32", float, float, float, a + b);
  OP2("add.rn.f32", float, float, float, a + b);
  OP2("add.ftz.f32", float, float, float, flushed(flushed(a) + flushed(b)));
  OP2("sub.f32", float, float, float, a - b);
  OP2("sub.rn.f32", float, float, float, a - b);
  OP2("sub.ftz.f32", float, float, float, flushed(flushed(a) - flushed(b)));
  OP2("mul.f32", float, float, float, a* b);
  OP2("mul.rn.f32", float, float, float, a* b);
  OP2("mul.ftz.f32", float, float, float, flushed(flushed(a) * flushed(b)));
  OP3("fma.rn.f32", float, float, float, float, std::fma(a, b, c));
  OP3("fma.rn.ftz.f32", float, float, float, float, flushed(std::fma(flushed(a), flushed(b), flushed(c))));
  OP2("min.f32", float, float, float, std::isnan(a) ? b : std::isnan(b) ? a : std::min(a, b));
  OP2("max.f32", float, float, float, std::isnan(a) ? b : std::isnan(b) ? a : std::max(a, b));
  OP2("min.NaN.f32", float, float, float, std::isnan(a) ? a : std::isnan(b) ? b : std::min(a, b));
  OP2("max.NaN.f32", float, float, float, std::isnan(a) ? a : std::isnan(b) ? b : std::max(a, b));
  OP1("neg.f32", float, float, -a);
  OP1("abs.f32", float, float, std::fabs(a));
  OP1("abs.ftz.f32", float, float, flushed(std::fabs(a)));
  OP1("mov.f32", float, float, a);
  OP2("div.full.f32", float, float, float, a / b);
  OP2("div.approx.f32", float, float, float, a / b);
  OP2("div.rn.f32", float, float, float, a / b);
  OP1("rcp.approx.f32", float, float, 1.0f / a);
  OP1("rcp.approx.ftz.f32", float, float, flushed(1.0f / flushed(a)));
  OP1("rcp.rn.f32", float, float, 1.0f / a);
  OP1("sqrt.approx.f32", float, float, std::sqrt(a));
  OP1("sqrt.approx.ftz.f32", float, float, std::sqrt(flushed(a)));
  OP1("sqrt.rn.f32", float, float, std::sqrt(a));
  OP1("rsqrt.approx.f32", float, float, 1.0 / std::sqrt(static_cast<double>(a)));
  OP1("rsqrt.approx.ftz.f32", float, float, 1.0 / std::sqrt(static_cast<double>(flushed(a))));
  OP1("ex2.approx.f32", float, float, with_error(std::exp2(a), 21));
  OP1("ex2.approx.ftz.f32", float, float, flushed(with_error(std::exp2(flushed(a)), 21)));
  OP1("lg2.approx.f32", float, float, with_error(std::log2(a), 21));
  OP1("lg2.approx.ftz.f32", float, float, with_error(std::log2(flushed(a)), 21));
  OP1("tanh.approx.f32", float, float, with_error(std::tanh(a), 11));
  OP1("sin.approx.f32", float, float, std::sin(a));
  OP1("cos.approx.f32", float, float, std::cos(a));
  all.push_back({"selp.f32", select<uint32_t>});
  COMPARE("setp.eq.f32", float, a == b);
  COMPARE("setp.ne.f32", float, a<b || a> b);
  COMPARE("setp.lt.f32", float, a < b);
  COMPARE("setp.le.f32", float, a <= b);
  COMPARE("setp.gt.f32", float, a > b);
  COMPARE("setp.ge.f32", float, a >= b);
  COMPARE("setp.equ.f32", float, !(a < b || a > b));
  COMPARE("setp.neu.f32", float, a != b);
  COMPARE("setp.ltu.f32", float, !(a >= b));
  COMPARE("setp.leu.f32", float, !(a > b));
  COMPARE("setp.gtu.f32", float, !(a <= b));
  COMPARE("setp.geu.f32", float, !(a < b));
  COMPARE("setp.num.f32", float, !std::isnan(a) && !std::isnan(b));
  COMPARE("setp.nan.f32", float, std::isnan(a) || std::isnan(b));

  LOGIC("and.pred", a & b);
  LOGIC("or.pred", a | b);
  LOGIC("xor.pred", a ^ b);
  all.push_back({"not.pred", [](Warp& w, const int32_t* o, Lanes lanes) {
                   Lanes& to = *w.reg<Lanes>(o[0]);
                   to = (to & ~lanes) | (~w.predicate(o[1]) & lanes);
                   return Then::next;
                 }});
  all.push_back({"mov.pred", [](Warp& w, const int32_t* o, Lanes lanes) {
                   Lanes& to = *w.reg<Lanes>(o[0]);
                   to = (to & ~lanes) | (w.predicate(o[1]) & lanes);
                   return Then::next;
                 }});

  // bf16 and fp16: sums and products in a wider type are rounded once.
  using emulation::from_e4m3, emulation::from_fp16, emulation::to_bf16, emulation::to_e4m3, emulation::to_fp16;
  OP3("fma.rn.bf16", uint16_t, uint16_t, uint16_t, uint16_t,
      to_bf16(std::fma(from_bf16(a), from_bf16(b), from_bf16(c))));
  OP2("add.bf16x2", uint32_t, uint32_t, uint32_t,
      pair(to_bf16(from_bf16(a >> 16) + from_bf16(b >> 16)), to_bf16(from_bf16(a) + from_bf16(b))));
  OP2("add.rn.bf16x2", uint32_t, uint32_t, uint32_t,
      pair(to_bf16(from_bf16(a >> 16) + from_bf16(b >> 16)), to_bf16(from_bf16(a) + from_bf16(b))));
  CONVERT("cvt.rn.bf16.f32", uint16_t, float, to_bf16(a));
  CONVERT("cvt.rn.f16.f32", uint16_t, float, to_fp16(a));
  OP1("cvt.f32.bf16", float, uint16_t, from_bf16(a));
  OP1("cvt.f32.f16", float, uint16_t, from_fp16(a));
  OP2("cvt.rn.bf16x2.f32", uint32_t, float, float, pair(to_bf16(a), to_bf16(b)));
  OP2("cvt.rn.f16x2.f32", uint32_t, float, float, pair(to_fp16(a), to_fp16(b)));
  OP2("cvt.rn.satfinite.e4m3x2.f32", uint16_t, float, float, to_e4m3(a) << 8 | to_e4m3(b));
  OP1("cvt.rn.f16x2.e4m3x2", uint32_t, uint16_t, pair(to_fp16(from_e4m3(a >> 8)), to_fp16(from_e4m3(a & 0xff))));
  OP1("cvt.rna.tf32.f32", uint32_t, uint32_t, (a + 0x1000) & ~0x1fffu);
  CONVERT("cvt.rn.bf16.u16", uint16_t, uint16_t, to_bf16(a));
  CONVERT("cvt.rn.bf16.s16", uint16_t, int16_t, to_bf16(a));
  OP1("cvt.rn.f32.s16", float, int16_t, a);
  OP1("cvt.rn.f32.u16", float, uint16_t, a);
  OP1("cvt.rn.f32.s32", float, int32_t, a);
  OP1("cvt.rn.f32.u32", float, uint32_t, a);
  OP1("cvt.rzi.s16.f32", int16_t, float, saturated<int16_t>(std::trunc(a)));
  OP1("cvt.rzi.s32.f32", int32_t, float, saturated<int32_t>(std::trunc(a)));
  OP1("cvt.rzi.u32.f32", uint32_t, float, saturated<uint32_t>(std::trunc(a)));
  OP1("cvt.rni.s32.f32", int32_t, float, saturated<int32_t>(std::nearbyint(a)));
  OP1("cvt.rni.f32.f32", float, float, std::nearbyint(a));
  OP1("cvt.rmi.f32.f32", float, float, std::floor(a));
  OP1("cvt.rpi.f32.f32", float, float, std::ceil(a));
  OP1("cvt.rzi.f32.f32", float, float, std::trunc(a));
#define WIDTHS(to, To)                        \
  CONVERT("cvt." to ".u8", To, uint8_t, a);   \
  CONVERT("cvt." to ".s8", To, int8_t, a);    \
  CONVERT("cvt." to ".u16", To, uint16_t, a); \
  CONVERT("cvt." to ".s16", To, int16_t, a);  \
  CONVERT("cvt." to ".u32", To, uint32_t, a); \
  CONVERT("cvt." to ".s32", To, int32_t, a);  \
  CONVERT("cvt." to ".u64", To, uint64_t, a); \
  CONVERT("cvt." to ".s64", To, int64_t, a)
  WIDTHS("u8", uint8_t);
  WIDTHS("s8", int8_t);
  WIDTHS("u16", uint16_t);
  WIDTHS("s16", int16_t);
  WIDTHS("u32", uint32_t);
  WIDTHS("s32", int32_t);
  WIDTHS("u64", uint64_t);
  WIDTHS("s64", int64_t);

  // Registers in parts: tests/helpers/ptx names a mov with a vector so.
  all.push_back({"unpack.b32", [](Warp& w, const int32_t* o, Lanes lanes) {
                   uint16_t *low = w.reg<uint16_t>(o[0]), *high = w.reg<uint16_t>(o[1]);
                   const uint32_t* from = w.reg<uint32_t>(o[2]);
                   for_lanes(lanes, [&](int i) { low[i] = from[i], high[i] = from[i] >> 16; });
                   return Then::next;
                 }});
  all.push_back({"unpack.b64", [](Warp& w, const int32_t* o, Lanes lanes) {
                   uint32_t *low = w.reg<uint32_t>(o[0]), *high = w.reg<uint32_t>(o[1]);
                   const uint64_t* from = w.reg<uint64_t>(o[2]);
                   for_lanes(lanes, [&](int i) { low[i] = from[i], high[i] = from[i] >> 32; });
                   return Then::next;
                 }});
  OP2("pack.b32", uint32_t, uint16_t, uint16_t, pair(b, a));
  OP2("pack.b64", uint64_t, uint32_t, uint32_t, uint64_t{b} << 32 | a);
}

}  // namespace ptx
