// Shares numbered units of work among threads, the caller being one of them.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace jaxzip {

// Runs `task` on some other thread, now or later.
using Scheduler = std::function<void(std::function<void()> task)>;

// Calls body(unit) for every unit in [0, units). Threads take runs of neighbouring units, so that what one prefetches
// past its unit is not lost, a few for each thread, so that none waits long at the end. The caller works too and waits only for units that another
// thread has already taken, so a busy pool, or one with no thread to spare, costs time but never a deadlock. An exception
// of `body` ends the work and is thrown again here, where everything that threads use is still alive.
inline void ParallelFor(int64_t units, int64_t num_threads, const Scheduler& schedule,
                        const std::function<void(int64_t)>& body) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t done = 0;          // guarded by mutex
    std::exception_ptr error;  // guarded by mutex: the first
    std::mutex mutex;
    std::condition_variable finished;
  };
  if (num_threads > units) num_threads = units;
  if (num_threads <= 1) {
    for (int64_t u = 0; u < units; ++u) body(u);
    return;
  }
  constexpr int64_t kRunsPerThread = 6;
  const int64_t run = std::max<int64_t>(1, units / (num_threads * kRunsPerThread));
  // A helper that starts late finds no unit left and touches nothing but this state, which it keeps alive.
  auto state = std::make_shared<State>();
  auto work = [state, units, run, body = &body] {
    int64_t count = 0;
    std::exception_ptr error;
    for (int64_t first; (first = state->next.fetch_add(run)) < units;) {
      const int64_t end = std::min(units, first + run);
      count += end - first;
      try {
        for (int64_t u = first; u < end && !state->failed; ++u) (*body)(u);
      } catch (...) {
        error = std::current_exception();
        state->failed = true;
      }
    }
    if (count == 0) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    if (!state->error) state->error = error;
    state->done += count;
    if (state->done == units) state->finished.notify_all();
  };
  try {
    for (int64_t t = 1; t < num_threads; ++t) schedule(work);
  } catch (const std::exception&) {  // no more threads to be had
  }
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == units; });
  if (state->error) std::rethrow_exception(state->error);
}

// Threads of one binding call: started for it and joined when it ends.
class ThreadTeam {
 public:
  explicit ThreadTeam(int64_t num_threads)
      : num_threads_(num_threads > 0 ? num_threads : std::max(1u, std::thread::hardware_concurrency())) {}
  ~ThreadTeam() { Join(); }
  void For(int64_t units, const std::function<void(int64_t)>& body) {
    ParallelFor(units, num_threads_, [this](std::function<void()> task) { threads_.emplace_back(std::move(task)); },
                body);
    Join();
  }
  int64_t num_threads() const { return num_threads_; }

 private:
  void Join() {
    for (std::thread& t : threads_) t.join();
    threads_.clear();
  }
  int64_t num_threads_;
  std::vector<std::thread> threads_;
};

}  // namespace jaxzip
