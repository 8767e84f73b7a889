/* The network for one instruction set: its steps in order, and what each is called with. */
#ifndef OC_VARIANT_H
#define OC_VARIANT_H
#include <stddef.h>

/* Where a pointer leads, and the bytes from there on: the arena, the weights, or a port's number above; or the
   number of a size that is read at run time. */
enum { SIZES = -1, ARENA, WEIGHTS, IO };
struct ref { long where; long offset; };

/* `refs` is the first of its pointers; a `serial` step is not divided between threads. */
struct step { void (*run)(int, int, char *const *, char *); int refs; int serial; };

struct variant {
  const char *isa;
  int step_count, ref_count;
  const struct step *steps;
  const char *const *step_names;
  const struct ref *refs;
  size_t arena_size, scratch_size;
  const int *arena_scaling; /* sizes by whose product places in the arena are multiplied */
  int scaling_count;
};
#endif
