#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace hqdit {
namespace {

std::atomic<GompParallel> gomp_parallel_of_torch{nullptr};

// A forked child has none of the parent's pool threads, and an OpenMP runtime waits for them for ever.
std::atomic<bool> is_forked_child{false};

struct Call {
  WorkerBody body;
  void* context;
  int workers;
  std::atomic<int> next{0};
};

// However many threads come, and one is enough, every share is done once.
void TakeShares(void* data) {
  Call& call = *static_cast<Call*>(data);
  for (int worker = call.next++; worker < call.workers; worker = call.next++) {
    call.body(call.context, worker, call.workers);
  }
}

void RunOnNewThreads(Call& call) {
  std::vector<std::thread> threads;
  for (int i = 1; i < call.workers; ++i) {
    try {
      threads.emplace_back(TakeShares, &call);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run take all shares
    }
  }
  TakeShares(&call);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void SetGompParallel(GompParallel gomp_parallel) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
  if (registered == 0) gomp_parallel_of_torch = gomp_parallel;
}

bool HasGompParallel() { return gomp_parallel_of_torch != nullptr && !is_forked_child; }

void RunWorkers(int threads, WorkerBody body, void* context) {
  Call call{body, context, threads < 1 ? 1 : threads};
  if (call.workers == 1) {
    TakeShares(&call);
  } else if (HasGompParallel()) {
    gomp_parallel_of_torch.load()(TakeShares, &call, static_cast<unsigned>(call.workers), 0);
  } else {
    RunOnNewThreads(call);
  }
}

}  // namespace hqdit
