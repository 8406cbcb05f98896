// What the drivers check with: a condition that fails is named, with its line, and ends the
// program.

#pragma once

#include <cstdio>
#include <cstdlib>

#define REQUIRE(condition)                                         \
  do {                                                             \
    if (!(condition)) {                                            \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      std::abort();                                                \
    }                                                              \
  } while (false)
