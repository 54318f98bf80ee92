// CHECK for the C++ programs among the tests: says which lines do not hold, the first ten of them, and counts them all.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                   \
    do {                                                                   \
        if (!(condition) && failures++ < 10)                               \
            std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
    } while (false)
