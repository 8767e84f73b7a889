/* What the processor has and the system lets be used, by the names of the compiler's options or, on ARM,
   of Linux. */
#ifndef OC_PROCESSOR_H
#define OC_PROCESSOR_H

#if defined(__x86_64__)
#define HAS(feature) __builtin_cpu_supports(feature)
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define HAS(feature) ((getauxval(AT_HWCAP) & HWCAP_##feature) != 0)
#endif

#if defined(__x86_64__) && defined(__linux__)
long syscall(long, ...);
/* Linux lets a process use AMX's registers when it asks: arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA. */
static inline int may_use_tiles(void) { return syscall(158, 0x1023, 18) == 0; }
#else
static inline int may_use_tiles(void) { return 0; }
#endif
#endif
