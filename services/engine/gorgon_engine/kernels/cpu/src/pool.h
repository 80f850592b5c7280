// Persistent worker threads that run one function together (SPMD), with a barrier cheap enough for ten a layer.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace gorgon {

class Pool {
 public:
  static Pool& instance();

  void set_num_threads(int count);
  int num_threads() const { return num_threads_; }

  // Runs body on every thread, the caller included, and returns when all have returned. Calls queue up.
  void run(const std::function<void()>& body);

  // Inside run(): every thread calls it with the same arguments. A thread takes the items of its own contiguous share
  // in order (its weights stream), then helps the others (a core shared with another process gets through fewer).
  // Returns on all threads after the last item is done.
  template <typename Function>
  void for_each(int64_t count, Function&& function) {
    const int own = thread_index();
    for (int i = 0; i < num_threads_; ++i) {
      const int share = own + i < num_threads_ ? own + i : own + i - num_threads_;
      const int64_t begin = count * share / num_threads_, size = count * (share + 1) / num_threads_ - begin;
      std::atomic<int64_t>& taken = taken_[share].count;
      while (taken.load(std::memory_order_relaxed) < size) {
        const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
        if (item < size) function(begin + item);
      }
    }
    barrier();
  }

  void barrier();

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> count{0};
  };

  static int& thread_index();
  void worker(int index, uint32_t seen);

  std::mutex run_mutex_;
  std::mutex park_mutex_;
  std::condition_variable park_;
  const std::function<void()>* body_ = nullptr;
  int num_threads_ = 1;
  int num_workers_ = 0;

  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> parked_{0};
  std::atomic<bool> stop_{false};
  std::unique_ptr<Counter[]> taken_{new Counter[1]};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> alive_{0};
};

}  // namespace gorgon
