/* Counts the calls that change files below one folder. At the n-th it ends the process, or there is
   no room on the disk from then on. A write that is hit writes half of its bytes first, as on a disk
   that fills up. Preloaded into a process and, through the environment, into its children, native
   code included; what it is told and counts lies in a file that all of them map. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, FULL = 2 };

struct state {
  long count; /* calls so far */
  long at;    /* the one that is hit; 0: do not count */
  long kind;
  char under[4096];
};

static struct state *state;

__attribute__((constructor)) static void begin(void) {
  int (*really_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
  const char *path = getenv("FAULTS");
  int handle = path ? really_open(path, O_RDWR | O_CLOEXEC) : -1;
  if (handle < 0) return;
  void *found = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
  close(handle);
  if (found != MAP_FAILED) state = found;
}

static int below(const char *path) {
  size_t length = strlen(state->under);
  return !strncmp(path, state->under, length) && (path[length] == '/' || !path[length]);
}

static int handle_below(int handle) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int path_below(int folder, const char *path) {
  if (path[0] == '/') return below(path);
  if (folder != AT_FDCWD) return handle_below(folder);
  char here[PATH_MAX];
  return getcwd(here, sizeof here) && below(here);
}

/* What becomes of a call that changes something: 0 nothing, 1 it is the one, 2 one after it. */
static int hit(void) {
  long count = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
  return count < state->at ? 0 : count == state->at ? 1 : 2;
}

static int armed(void) { return state && state->at; }

/* Whether the call fails, errno set; does not return when the process is to end. */
static int fails(void) {
  if (!hit()) return 0;
  if (state->kind == KILL) _exit(137);
  errno = ENOSPC;
  return 1;
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPENS(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (armed() && flags & (O_CREAT | O_TRUNC) && path_below(AT_FDCWD, path) && fails()) return -1; \
    return real(path, flags, mode); \
  }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (armed() && flags & (O_CREAT | O_TRUNC) && path_below(folder, path) && fails()) return -1; \
    return real(folder, path, flags, mode); \
  }
OPENS_AT(openat)
OPENS_AT(openat64)

#define FOPENS(name) \
  FILE *name(const char *path, const char *mode) { \
    REAL(name); \
    if (armed() && strpbrk(mode, "wa+") && path_below(AT_FDCWD, path) && fails()) return NULL; \
    return real(path, mode); \
  }
FOPENS(fopen)
FOPENS(fopen64)

/* `half` does the call with half of its bytes and gives what it gave. */
#define WRITES(name, handle, bytes, half, whole, ...) \
  ssize_t name(__VA_ARGS__) { \
    REAL(name); \
    if (armed() && handle_below(handle)) { \
      int now = hit(); \
      if (now) { \
        ssize_t written = now == 1 && (bytes) > 1 ? half : 0; \
        if (state->kind == KILL) _exit(137); \
        if (written > 0) return written; \
        errno = ENOSPC; \
        return -1; \
      } \
    } \
    return whole; \
  }
WRITES(write, to, n, real(to, from, n / 2), real(to, from, n), int to, const void *from, size_t n)
WRITES(pwrite, to, n, real(to, from, n / 2, at), real(to, from, n, at), int to, const void *from,
       size_t n, off_t at)
WRITES(pwrite64, to, n, real(to, from, n / 2, at), real(to, from, n, at), int to, const void *from,
       size_t n, off64_t at)
WRITES(writev, to, 0, 0, real(to, from, n), int to, const struct iovec *from, int n)
WRITES(sendfile, to, n, real(to, from, at, n / 2), real(to, from, at, n), int to, int from,
       off_t *at, size_t n)
WRITES(sendfile64, to, n, real(to, from, at, n / 2), real(to, from, at, n), int to, int from,
       off64_t *at, size_t n)
WRITES(copy_file_range, to, n, real(from, a, to, b, n / 2, flags), real(from, a, to, b, n, flags),
       int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags)

#define CHANGES(name, where, call, ...) \
  int name(__VA_ARGS__) { \
    REAL(name); \
    if (armed() && (where) && fails()) return -1; \
    return real call; \
  }
CHANGES(fsync, handle_below(to), (to), int to)
CHANGES(fdatasync, handle_below(to), (to), int to)
CHANGES(ftruncate, handle_below(to), (to, n), int to, off_t n)
CHANGES(ftruncate64, handle_below(to), (to, n), int to, off64_t n)
CHANGES(mkdir, path_below(AT_FDCWD, path), (path, mode), const char *path, mode_t mode)
CHANGES(mkdirat, path_below(folder, path), (folder, path, mode), int folder, const char *path,
        mode_t mode)
CHANGES(rename, path_below(AT_FDCWD, to), (from, to), const char *from, const char *to)
CHANGES(renameat, path_below(b, to), (a, from, b, to), int a, const char *from, int b,
        const char *to)
CHANGES(renameat2, path_below(b, to), (a, from, b, to, flags), int a, const char *from, int b,
        const char *to, unsigned flags)
CHANGES(link, path_below(AT_FDCWD, to), (from, to), const char *from, const char *to)
CHANGES(symlink, path_below(AT_FDCWD, to), (from, to), const char *from, const char *to)

/* Removing needs no room. */
#define REMOVES(name, where, call, ...) \
  int name(__VA_ARGS__) { \
    REAL(name); \
    if (armed() && (where) && hit() && state->kind == KILL) _exit(137); \
    return real call; \
  }
REMOVES(unlink, path_below(AT_FDCWD, path), (path), const char *path)
REMOVES(unlinkat, path_below(folder, path), (folder, path, flags), int folder, const char *path,
        int flags)
REMOVES(rmdir, path_below(AT_FDCWD, path), (path), const char *path)
