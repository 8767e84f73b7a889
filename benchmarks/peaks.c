/* What one core can do: giga operations a second of independent products that stay in registers, best
   of several rounds. Prints a line "type instructions rate" for each that the machine has; a
   multiply-accumulate is two operations. */
#include <cpuid.h>
#include <immintrin.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

#define ROUNDS 12

/* Sixteen accumulators of vectors, eight where there are sixteen registers; named ones stay in
   registers, and the empty assembly keeps every product. */
#define EIGHT(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
#define SIXTEEN(F) EIGHT(F) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15)
#define START(N) v a##N = zero;
#define STEP(N)      \
  a##N = DOT(a##N);  \
  __asm__ volatile("" : "+v"(a##N));

#define PEAK(NAME, TARGET, EACH, OPERATIONS)                                        \
  __attribute__((target(TARGET))) static double NAME(void) {                        \
    const v zero = {0}, x = zero + 1, y = zero + 1;                                 \
    const long steps = 2000000;                                                     \
    double best = 0;                                                                \
    for (int round = 0; round < ROUNDS; ++round) {                                  \
      EACH(START)                                                                   \
      double start = now();                                                         \
      for (long i = 0; i < steps; ++i) {                                            \
        EACH(STEP)                                                                  \
      }                                                                             \
      double rate = (double)steps * (OPERATIONS) / (now() - start) / 1e9;           \
      if (rate > best) best = rate;                                                 \
    }                                                                               \
    return best;                                                                    \
  }

#define v __m512i
#define DOT(A) _mm512_dpbusd_epi32(A, x, y)
PEAK(int8_vnni, "avx512f,avx512bw,avx512vnni", SIXTEEN, 16 * 128)
#undef v
#undef DOT

#define v __m512
#define DOT(A) _mm512_fmadd_ps(x, y, A)
PEAK(fp32_avx512, "avx512f", SIXTEEN, 16 * 32)
#undef DOT
#define DOT(A) _mm512_dpbf16_ps(A, (__m512bh)x, (__m512bh)y)
PEAK(bf16_avx512, "avx512f,avx512bf16", SIXTEEN, 16 * 64)
#undef v
#undef DOT

#define v __m256
#define DOT(A) _mm256_fmadd_ps(x, y, A)
PEAK(fp32_avx2, "avx2,fma", EIGHT, 8 * 16)

/* Four tiles of sums from two of rows and two of columns; a tile is 16 rows of 64 bytes. */
#define TILES(NAME, TARGET, DOT, OPERATIONS)                                        \
  __attribute__((target(TARGET))) static double NAME(void) {                        \
    static const char zeros[1024];                                                  \
    struct {                                                                        \
      unsigned char palette, row, rest[14];                                         \
      unsigned short bytes[16];                                                     \
      unsigned char rows[16];                                                       \
    } shape = {1, 0, {0}, {0}, {0}};                                                \
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;            \
    _tile_loadconfig(&shape);                                                       \
    _tile_loadd(4, zeros, 64); _tile_loadd(5, zeros, 64);                           \
    _tile_loadd(6, zeros, 64); _tile_loadd(7, zeros, 64);                           \
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);                     \
    const long steps = 200000;                                                      \
    double best = 0;                                                                \
    for (int round = 0; round < ROUNDS; ++round) {                                  \
      double start = now();                                                         \
      for (long i = 0; i < steps; ++i) {                                            \
        DOT(0, 4, 6); DOT(1, 5, 6); DOT(2, 4, 7); DOT(3, 5, 7);                     \
      }                                                                             \
      double rate = (double)steps * 4 * (OPERATIONS) / (now() - start) / 1e9;       \
      if (rate > best) best = rate;                                                 \
    }                                                                               \
    _tile_release();                                                                \
    return best;                                                                    \
  }

TILES(int8_amx, "amx-tile,amx-int8", _tile_dpbusd, 2 * 16 * 16 * 64)
TILES(bf16_amx, "amx-tile,amx-bf16", _tile_dpbf16ps, 2 * 16 * 16 * 32)

/* Whether the kernel lets this process use tiles (ARCH_REQ_XCOMP_PERM for XTILEDATA). */
static int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

int main(void) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const int tiles = (d >> 24 & 1) && tiles_allowed();
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    printf("fp32 avx2 %.1f\n", fp32_avx2());
  if (__builtin_cpu_supports("avx512f")) printf("fp32 avx512 %.1f\n", fp32_avx512());
  if (__builtin_cpu_supports("avx512vnni")) printf("int8 avx512_vnni %.1f\n", int8_vnni());
  if (__builtin_cpu_supports("avx512bf16")) printf("bf16 avx512_bf16 %.1f\n", bf16_avx512());
  if (tiles && (d >> 25 & 1)) printf("int8 amx %.1f\n", int8_amx());
  if (tiles && (d >> 22 & 1)) printf("bf16 amx %.1f\n", bf16_amx());
  return 0;
}
