#include "pool.h"

#include <chrono>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace gorgon {
namespace {

// Long enough to bridge the gap between two forwards' phases, short enough to leave the cores to torch's own threads.
constexpr std::chrono::microseconds kSpin{100};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

Pool* g_pool = nullptr;

// A forked child inherits no threads: it goes on with a pool of one (its copy of the parent's is never touched again).
void replace_after_fork() { g_pool = new Pool(); }

}  // namespace

Pool& Pool::instance() {
  static const bool created = [] {
    g_pool = new Pool();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, replace_after_fork);
#endif
    return true;
  }();
  (void)created;
  return *g_pool;
}

int& Pool::thread_index() {
  static thread_local int index = 0;  // a caller of run() is always number 0
  return index;
}

void Pool::set_num_threads(int count) {
  const std::lock_guard<std::mutex> lock(run_mutex_);
  if (count == num_threads_ && num_workers_ == count - 1) return;
  if (num_workers_ > 0) {
    stop_.store(true);
    epoch_.fetch_add(1);
    { const std::lock_guard<std::mutex> park_lock(park_mutex_); }
    park_.notify_all();
    while (alive_.load() > 0) std::this_thread::yield();
    stop_.store(false);
  }
  num_threads_ = count;
  taken_.reset(new Counter[count]);
  num_workers_ = count - 1;
  alive_.store(num_workers_);
  const uint32_t seen = epoch_.load();
  for (int i = 0; i < num_workers_; ++i) std::thread([=] { worker(i + 1, seen); }).detach();
}

void Pool::run(const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(run_mutex_);
  if (num_workers_ == 0) return body();
  body_ = &body;
  epoch_.fetch_add(1);
  if (parked_.load() > 0) {
    { const std::lock_guard<std::mutex> park_lock(park_mutex_); }
    park_.notify_all();
  }
  body();
  barrier();
}

void Pool::worker(int index, uint32_t seen) {
  thread_index() = index;
  for (;;) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1; epoch_.load() == seen; ++spins) {
      relax();
      if (spins % 64 != 0 || std::chrono::steady_clock::now() < deadline) continue;
      std::unique_lock<std::mutex> lock(park_mutex_);
      parked_.fetch_add(1);
      park_.wait(lock, [&] { return epoch_.load() != seen; });
      parked_.fetch_sub(1);
    }
    ++seen;
    if (stop_.load()) break;
    (*body_)();
    barrier();
  }
  alive_.fetch_sub(1);
}

void Pool::barrier() {
  if (num_threads_ == 1) {
    taken_[0].count.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    for (int i = 0; i < num_threads_; ++i) taken_[i].count.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    // The missing thread may be off its core: after a while, offer it ours.
    if (spins < 256) relax();
    else std::this_thread::yield();
  }
}

}  // namespace gorgon
