// Persistent worker threads that run one function together (SPMD), with a barrier cheap enough for ten a layer.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

namespace gorgon {

class Pool {
 public:
  static Pool& instance();

  void set_num_threads(int count);
  int num_threads() const { return num_threads_; }

  // Runs body on every thread, the caller included, and returns when all have returned. Calls queue up.
  void run(const std::function<void()>& body);

  // Inside run(): every thread calls it with the same arguments. Items are handed out as threads become free (a core
  // shared with another process then takes fewer); returns on all threads after the last item is done.
  template <typename Function>
  void for_each(int64_t count, Function&& function) {
    for (int64_t item = take(); item < count; item = take()) function(item);
    barrier();
  }

  void barrier();

 private:
  int64_t take() { return next_item_.fetch_add(1, std::memory_order_relaxed); }
  void worker(uint32_t seen);

  std::mutex run_mutex_;
  std::mutex park_mutex_;
  std::condition_variable park_;
  const std::function<void()>* body_ = nullptr;
  int num_threads_ = 1;
  int num_workers_ = 0;

  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> parked_{0};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int64_t> next_item_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> alive_{0};
};

}  // namespace gorgon
