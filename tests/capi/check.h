/* CHECK: what a C test needs of a test framework. A failure is printed and counted; main returns failures(). */

#ifndef KAKEYA_TESTS_CHECK_H
#define KAKEYA_TESTS_CHECK_H

#include <stdio.h>
#include <string.h>

#include "kakeya.h"

static int check_failures = 0;

#define CHECK(condition, ...)                                         \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fputc('\n', stderr);                                            \
      ++check_failures;                                               \
    }                                                                 \
  } while (0)

/* The call must succeed. */
#define CHECK_OK(call)                                                                                 \
  do {                                                                                                 \
    const kakeya_status check_status = (call);                                                         \
    CHECK(check_status == KAKEYA_OK, "%s: %s", kakeya_status_name(check_status), kakeya_last_error()); \
  } while (0)

/* The call must be refused with this status, and the last error must contain this text. */
#define CHECK_REFUSED(call, expected, part)                                                                     \
  do {                                                                                                          \
    const kakeya_status check_status = (call);                                                                  \
    CHECK(check_status == (expected), "got %s (%s)", kakeya_status_name(check_status), kakeya_last_error());    \
    CHECK(strstr(kakeya_last_error(), (part)) != NULL, "\"%s\" is not in \"%s\"", (part), kakeya_last_error()); \
  } while (0)

/* Exit code of a test program. */
static inline int failures(const char *name) {
  if (check_failures == 0) {
    printf("%s: ok\n", name);
    return 0;
  }
  fprintf(stderr, "%s: %d checks failed\n", name, check_failures);
  return 1;
}

#endif
