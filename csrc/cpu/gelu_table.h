// GELU in AVX-512, whose registers hold a table of sixteen numbers that one instruction looks up: half as many
// instructions as gelu of activation.h.
#pragma once

#include "activation.h"
#include "numbers.h"

namespace vitfast {

#ifdef VITFAST_SIMD_LEVELS

// x / 2 * (1 + erf(x / sqrt(2))) = max(x, 0) - q(|x|) with q(a) = a / 2 * erfc(a / sqrt(2)). By power of the distance
// from i * kGeluStep, the coefficients of the polynomial of degree 5 that is closest to q in the interval around it (at
// 0 that of degree 4 to q(a) / a, so that small numbers keep their digits; at the last none, as q is 0 there to 6e-9).
// Off by 2.4e-7 at most, which is the rounding of the sum, and by 3e-8 for x < 0.
constexpr float kGeluStep = 0.4f;
alignas(64) constexpr float kGelu[6][kWide] = {
    {0.0f, 0.1378313f, 0.169484332f, 0.138083622f, 0.087678872f, 0.0455002598f, 0.0196740814f, 0.00715436134f,
     0.00219884049f, 0.000572791032f, 0.000126685234f, 2.38153407e-05f, 3.80802817e-06f, 5.181642e-07f, 6.00214065e-08f,
     0.0f},
    {0.5f, 0.197270215f, -0.0198978316f, -0.117953598f, -0.122674055f, -0.0852318034f, -0.0455493331f, -0.0196081288f,
     -0.00694194157f, -0.00204373756f, -0.000503649702f, -0.000104334475f, -1.82209824e-05f, -2.68811914e-06f,
     -3.3551521e-07f, 0.0f},
    {-0.398940742f, -0.338803828f, -0.196993232f, -0.0543781742f, 0.0310544483f, 0.0539913513f, 0.0421034917f,
     0.0231142994f, 0.00982274301f, 0.00335312332f, 0.000936678436f, 0.000216430926f, 4.16484218e-05f, 6.70560803e-06f,
     9.06294531e-07f, 0.0f},
    {-6.11274518e-05f, 0.0942730084f, 0.129778281f, 0.0994234383f, 0.0425958969f, 1.55363045e-06f, -0.0157656893f,
     -0.01418503f, -0.00793461688f, -0.00328967604f, -0.0010706149f, -0.000280918f, -6.03221597e-05f, -1.06996995e-05f,
     -1.57755653e-06f, 0.0f},
    {0.067348972f, 0.0442721173f, -0.000650079863f, -0.032009773f, -0.0338193327f, -0.0180230141f, -0.00305086444f,
     0.00341233332f, 0.00367309945f, 0.002077949f, 0.000834158156f, 0.000257485342f, 6.32833471e-05f, 1.26193599e-05f,
     2.06543814e-06f, 0.0f},
    {-0.00493306294f, -0.019759329f, -0.0217810906f, -0.00823021587f, 0.00521853473f, 0.00892065559f, 0.00545345619f,
     0.00127832964f, -0.000631006202f, -0.000792155915f, -0.000438521965f, -0.000166180966f, -4.7622776e-05f,
     -1.07540736e-05f, -1.95575626e-06f, 0.0f},
};

VITFAST_INLINE Floats look_up(const float (&table)[kWide], const Bits& index) {
  Floats found;  // not by an intrinsic: the header of GCC 12's gives warnings
  asm("vpermps %2, %1, %0" : "=v"(found) : "v"(index), "v"(load<kWide>(table)));
  return found;
}

VITFAST_INLINE Floats gelu_by_table(const Floats& x) {
  constexpr float kEnd = (kWide - 1) * kGeluStep, kRound = 0x1.8p23f;  // a sum with it ends in the bits of the integer
  const Floats size = magnitude<kWide>(x), a = size < kEnd ? size : kEnd - Floats{};
  const Floats shifted = a * (1.0f / kGeluStep) + kRound, from = a - (shifted - kRound) * kGeluStep;
  const Bits i = bits_of(shifted);
  Floats q = look_up(kGelu[5], i);
#pragma GCC unroll 5
  for (int power = 4; power >= 0; --power) q = q * from + look_up(kGelu[power], i);
  return (x < 0.0f ? x * 0.0f : x) - q;  // NaN for NaN and for -infinity, as the definition has it
}

#endif

}  // namespace vitfast
