/* Single elements: types that C has no arithmetic for, and operations that C leaves undefined. */
#ifndef OC_SCALAR_H
#define OC_SCALAR_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SCALAR static inline __attribute__((unused))

enum { OC_IEEE, OC_FN, OC_FNUZ, OC_FINITE }; /* what the codes beyond the largest number mean */

/* The number that a small float's bits stand for: sign, exponent, mantissa, from the top down. */
SCALAR float oc_widen(unsigned bits, int exponent, int mantissa, int bias, int kind) {
  const unsigned sign = bits >> (exponent + mantissa) & 1, top = (1u << exponent) - 1;
  const unsigned e = bits >> mantissa & top, m = bits & ((1u << mantissa) - 1);
  if (kind == OC_IEEE && e == top) return m ? NAN : sign ? -INFINITY : INFINITY;
  if (kind == OC_FN && e == top && m == (1u << mantissa) - 1) return NAN;
  if (kind == OC_FNUZ && sign && !e && !m) return NAN;
  const float x = e ? ldexpf((float)(m | 1u << mantissa), (int)e - bias - mantissa)
                    : ldexpf((float)m, 1 - bias - mantissa);
  return sign ? -x : x;
}

/* The bits of the nearest small float, halves to even; `saturate` ends at the largest one. */
SCALAR unsigned oc_narrow(double x, int exponent, int mantissa, int bias, int kind, int saturate) {
  const unsigned side = (signbit(x) ? 1u : 0u) << (exponent + mantissa);
  const unsigned all = (1u << (exponent + mantissa)) - 1;
  const unsigned infinite = all & ~((1u << mantissa) - 1);
  const unsigned largest = kind == OC_IEEE ? infinite - 1 : kind == OC_FN ? all - 1 : all;
  const unsigned none = kind == OC_FNUZ ? all + 1 : kind == OC_IEEE ? infinite | 1u << (mantissa - 1) : all;
  const double a = fabs(x);
  if (isnan(x)) return kind == OC_FNUZ ? none : kind == OC_FINITE ? all + 1 : side | none;
  unsigned code = largest + 1;
  if (a == 0) {
    code = 0;
  } else if (!isinf(a)) {
    int e = ilogb(a) > 1 - bias ? ilogb(a) : 1 - bias;
    double q = nearbyint(ldexp(a, mantissa - e));
    double wide = ldexp(e + bias - 1, mantissa) + q;
    code = wide > largest ? largest + 1 : (unsigned)wide;
  }
  if (code > largest) {
    if (saturate || kind == OC_FINITE) return side | largest;
    return kind == OC_IEEE ? side | infinite : kind == OC_FN ? side | all : none;
  }
  return kind == OC_FNUZ && !code ? 0 : side | code;
}

#define OC_SMALL(NAME, TYPE, E, M, BIAS, KIND, SATURATE)                                              \
  SCALAR float oc_load_##NAME(TYPE x) { return oc_widen(x, E, M, BIAS, KIND); }                      \
  SCALAR TYPE oc_store_##NAME(double x) { return (TYPE)oc_narrow(x, E, M, BIAS, KIND, 0); }          \
  SCALAR float oc_open_##NAME(double x) { return oc_load_##NAME(oc_store_##NAME(x)); }               \
  SCALAR float oc_cast_##NAME(double x) {                                                            \
    return oc_load_##NAME((TYPE)oc_narrow(x, E, M, BIAS, KIND, SATURATE));                           \
  }

OC_SMALL(FLOAT16, uint16_t, 5, 10, 15, OC_IEEE, 0)
OC_SMALL(FLOAT8E4M3FN, uint8_t, 4, 3, 7, OC_FN, 1)
OC_SMALL(FLOAT8E4M3FNUZ, uint8_t, 4, 3, 8, OC_FNUZ, 1)
OC_SMALL(FLOAT8E5M2, uint8_t, 5, 2, 15, OC_IEEE, 1)
OC_SMALL(FLOAT8E5M2FNUZ, uint8_t, 5, 2, 16, OC_FNUZ, 1)
OC_SMALL(FLOAT4E2M1, uint8_t, 2, 1, 1, OC_FINITE, 1)

SCALAR float oc_load_BFLOAT16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
SCALAR uint16_t oc_store_BFLOAT16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
SCALAR float oc_cast_BFLOAT16(float x) { return oc_load_BFLOAT16(oc_store_BFLOAT16(x)); }
SCALAR float oc_open_BFLOAT16(float x) { return oc_cast_BFLOAT16(x); }

/* Whole numbers of few bits, the low ones of a byte. */
#define OC_BITS(NAME, TYPE, HIGH, BITS)                                                              \
  SCALAR TYPE oc_cast_##NAME(int64_t x) {                                                            \
    const int low = (int)(x & ((1 << BITS) - 1));                                                    \
    return (TYPE)(low > HIGH ? low - (1 << BITS) : low);                                             \
  }                                                                                                  \
  SCALAR TYPE oc_load_##NAME(uint8_t x) { return oc_cast_##NAME(x); }                                \
  SCALAR uint8_t oc_store_##NAME(TYPE x) { return (uint8_t)(x & ((1 << BITS) - 1)); }

OC_BITS(INT4, int8_t, 7, 4)
OC_BITS(UINT4, uint8_t, 15, 4)
OC_BITS(INT2, int8_t, 1, 2)
OC_BITS(UINT2, uint8_t, 3, 2)

#define OC_SIGNED(NAME, TYPE, WIDE)                                                                  \
  SCALAR TYPE oc_div_##NAME(TYPE a, TYPE b) {                                                        \
    return b == 0 ? 0 : b == -1 ? (TYPE)(0 - (WIDE)a) : (TYPE)(a / b);                               \
  }                                                                                                  \
  SCALAR TYPE oc_fmod_##NAME(TYPE a, TYPE b) { return b == 0 || b == -1 ? 0 : (TYPE)(a % b); }       \
  SCALAR TYPE oc_mod_##NAME(TYPE a, TYPE b) {                                                        \
    const TYPE r = oc_fmod_##NAME(a, b);                                                             \
    return r != 0 && (r < 0) != (b < 0) ? (TYPE)(r + b) : r;                                         \
  }                                                                                                  \
  SCALAR TYPE oc_pow_##NAME(TYPE a, double b) {                                                      \
    if (b < 0 || b != floor(b)) return (TYPE)pow((double)a, b);                                      \
    WIDE r = 1, x = (WIDE)a;                                                                         \
    for (uint64_t n = (uint64_t)b; n; n >>= 1, x *= x)                                               \
      if (n & 1) r *= x;                                                                             \
    return (TYPE)r;                                                                                  \
  }
#define OC_UNSIGNED(NAME, TYPE, WIDE)                                                                \
  SCALAR TYPE oc_div_##NAME(TYPE a, TYPE b) { return b == 0 ? 0 : (TYPE)(a / b); }                   \
  SCALAR TYPE oc_fmod_##NAME(TYPE a, TYPE b) { return b == 0 ? 0 : (TYPE)(a % b); }                  \
  SCALAR TYPE oc_mod_##NAME(TYPE a, TYPE b) { return oc_fmod_##NAME(a, b); }                         \
  SCALAR TYPE oc_pow_##NAME(TYPE a, double b) {                                                      \
    if (b < 0 || b != floor(b)) return (TYPE)pow((double)a, b);                                      \
    WIDE r = 1, x = (WIDE)a;                                                                         \
    for (uint64_t n = (uint64_t)b; n; n >>= 1, x *= x)                                               \
      if (n & 1) r *= x;                                                                             \
    return (TYPE)r;                                                                                  \
  }

OC_SIGNED(INT64, int64_t, uint64_t)
OC_SIGNED(INT32, int32_t, uint32_t)
OC_SIGNED(INT16, int16_t, uint32_t)
OC_SIGNED(INT8, int8_t, uint32_t)
OC_UNSIGNED(UINT64, uint64_t, uint64_t)
OC_UNSIGNED(UINT32, uint32_t, uint32_t)
OC_UNSIGNED(UINT16, uint16_t, uint32_t)
OC_UNSIGNED(UINT8, uint8_t, uint32_t)

#endif
