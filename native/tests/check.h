// A few lines instead of a test library, so that the tests build wherever the kernels do.
//
//   TEST(AddsUp) { CHECK(1 + 1 == 2); }
//   int main(int argc, char** argv) { return RunTests(argc, argv); }
//
// Arguments select tests whose name contains one of them. A failed CHECK prints its place and lets the test go on.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

namespace hqdit_test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

inline int& Failures() {
  static int failures = 0;
  return failures;
}

inline bool Register(const char* name, void (*body)()) {
  Tests().push_back({name, body});
  return true;
}

inline void Check(bool holds, const char* condition, const char* file, int line) {
  constexpr int kMostPrinted = 50;
  if (holds) return;
  if (++Failures() <= kMostPrinted) std::fprintf(stderr, "%s:%d: not true: %s\n", file, line, condition);
}

inline int RunTests(int argc, char** argv) {
  int failed = 0, passed = 0;
  for (const Test& test : Tests()) {
    bool is_selected = argc < 2;
    for (int i = 1; i < argc; ++i) is_selected |= std::strstr(test.name, argv[i]) != nullptr;
    if (!is_selected) continue;
    const int before = Failures();
    test.body();
    const bool has_passed = Failures() == before;
    std::printf("%s %s\n", has_passed ? "ok    " : "FAILED", test.name);
    std::fflush(stdout);
    (has_passed ? passed : failed) += 1;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace hqdit_test

#define CHECK(condition) ::hqdit_test::Check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)

#define TEST(name)                                                                                     \
  static void Test##name();                                                                            \
  static const bool registered_##name = ::hqdit_test::Register(#name, Test##name);                     \
  static void Test##name()

using hqdit_test::RunTests;
