/* What one core can do: giga operations a second of int8 (vpdpbusd), bf16 (vdpbf16ps) and fp32 (FMA)
   products with 16 independent accumulators, best of several rounds. Prints "int8 bf16 fp32"; 0 for
   what the machine does not have. */
#include <immintrin.h>
#include <stdio.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

#define EACH(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15)

/* named accumulators stay in registers; the empty assembly keeps every product */
#define START(N) v a##N = zero;
#define STEP(N)      \
  a##N = DOT(a##N);  \
  __asm__ volatile("" : "+v"(a##N));

#define PEAK(NAME, TARGET, OPERATIONS)                                  \
  __attribute__((target(TARGET))) static double NAME(void) {            \
    const v zero = {0}, x = zero + 1, y = zero + 1;                     \
    const long steps = 2000000;                                         \
    double best = 0;                                                    \
    for (int round = 0; round < 12; ++round) {                          \
      EACH(START)                                                       \
      double start = now();                                             \
      for (long i = 0; i < steps; ++i) {                                \
        EACH(STEP)                                                      \
      }                                                                 \
      double rate = (double)steps * 16 * (OPERATIONS) / (now() - start) / 1e9; \
      if (rate > best) best = rate;                                     \
    }                                                                   \
    return best;                                                        \
  }

typedef __m512i v_int;
typedef __m512 v_float;

#define v v_int
#define DOT(A) _mm512_dpbusd_epi32(A, x, y)
PEAK(int8, "avx512f,avx512bw,avx512vnni", 128)
#undef v
#undef DOT

#define v v_float
#define DOT(A) _mm512_fmadd_ps(x, y, A)
PEAK(fp32, "avx512f", 32)
#undef DOT
#define DOT(A) _mm512_dpbf16_ps(A, (__m512bh)x, (__m512bh)y)
PEAK(bf16, "avx512f,avx512bf16", 64)

int main(void) {
  int wide = __builtin_cpu_supports("avx512f");
  printf("%.1f %.1f %.1f\n", wide && __builtin_cpu_supports("avx512vnni") ? int8() : 0.0,
         wide && __builtin_cpu_supports("avx512bf16") ? bf16() : 0.0, wide ? fp32() : 0.0);
  return 0;
}
