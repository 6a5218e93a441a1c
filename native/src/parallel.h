// Threads: a kernel's work is cut into items, and each thread takes the next item until none is left.
#pragma once

#include <cstdint>

namespace hqdit {

// Runs `body(context, worker, workers)` once for each worker in 0 .. workers - 1, workers = max(1, threads), and returns
// when all have ended. The caller's thread takes part; where fewer threads can be had (nested calls, no more threads in
// the system), each does the shares of several workers.
using WorkerBody = void (*)(void* context, int worker, int workers);
void RunWorkers(int threads, WorkerBody body, void* context);

// `GOMP_parallel` of the OpenMP runtime that torch uses, so that both share one pool of threads; null: threads are
// started for each call.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
void SetGompParallel(GompParallel gomp_parallel);
bool HasGompParallel();

}  // namespace hqdit
