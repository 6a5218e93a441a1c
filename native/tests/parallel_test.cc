// Threads: every share is done once, whatever runs it, and a forked child can go on.
#include "parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <vector>

#include "check.h"

namespace {

struct Counts {
  std::vector<std::atomic<int>> of_worker;
  std::atomic<int> wrong_workers{0};
  explicit Counts(int workers) : of_worker(workers) {}
};

void Count(void* context, int worker, int workers) {
  Counts& counts = *static_cast<Counts*>(context);
  if (workers != static_cast<int>(counts.of_worker.size())) ++counts.wrong_workers;
  ++counts.of_worker[worker];
}

bool EveryShareIsDoneOnce(int threads) {
  Counts counts(threads);
  hqdit::RunWorkers(threads, Count, &counts);
  bool all_once = counts.wrong_workers == 0;
  for (const std::atomic<int>& count : counts.of_worker) all_once &= count == 1;
  return all_once;
}

int gomp_calls = 0;

// An OpenMP runtime that has only one thread to give, as in a nested parallel region.
void OneThread(void (*body)(void*), void* data, unsigned, unsigned) {
  ++gomp_calls;
  body(data);
}

void NestedCount(void* context, int, int) {
  if (!EveryShareIsDoneOnce(2)) ++*static_cast<std::atomic<int>*>(context);
}

}  // namespace

TEST(EveryShareIsDoneOnceOnNewThreads) {
  hqdit::SetGompParallel(nullptr);
  for (int threads = 1; threads <= 9; ++threads) CHECK(EveryShareIsDoneOnce(threads));
  CHECK(!hqdit::HasGompParallel());
}

TEST(FewerThreadsThanAskedForStillDoEveryShare) {
  hqdit::SetGompParallel(OneThread);
  gomp_calls = 0;
  CHECK(EveryShareIsDoneOnce(5));
  CHECK(gomp_calls == 1);
  CHECK(EveryShareIsDoneOnce(1));
  CHECK(gomp_calls == 1);  // one worker needs no pool
  hqdit::SetGompParallel(nullptr);
}

TEST(CallsMayNest) {
  std::atomic<int> wrong{0};
  hqdit::RunWorkers(3, NestedCount, &wrong);
  CHECK(wrong == 0);
}

TEST(ForkedChildDoesNotUseTheParentsPool) {
  hqdit::SetGompParallel(OneThread);
  const pid_t child = fork();
  if (child == 0) {
    const int before = gomp_calls;
    const bool is_right = EveryShareIsDoneOnce(3) && gomp_calls == before && !hqdit::HasGompParallel();
    _exit(is_right ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(hqdit::HasGompParallel());
  hqdit::SetGompParallel(nullptr);
}

int main(int argc, char** argv) { return RunTests(argc, argv); }
