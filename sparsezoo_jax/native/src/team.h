// The threads that work on one operation: its caller, and helpers of XLA's pool as they become free.
#ifndef SPARSEZOO_TEAM_H_
#define SPARSEZOO_TEAM_H_

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

namespace sparsezoo {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs the phases of an operation, one after another; in each of them threads take items as they get to them.
//
// The caller works as well and waits only for items that a helper has begun: with all of the pool's threads busy, or
// none, it does everything itself. A helper that starts late finds nothing left and touches nothing of the caller's.
class Team {
 public:
  // `schedule` puts a task into the pool, of which there are `threads`; `items` is the most that a phase has.
  Team(const std::function<void(std::function<void()>)>& schedule, long threads, long items) : shared_(new Shared) {
    const long helpers = (threads < items ? threads : items) - 1;
    for (long i = 0; i < helpers; i++) schedule([shared = shared_] { shared->help(); });
  }

  ~Team() { shared_->done.store(true, std::memory_order_release); }

  // f(i) for every i in [0, n), on any thread, in any order; returns when all are done.
  template <class F>
  void run(long n, const F& f) {
    const int number = shared_->published.load(std::memory_order_relaxed);
    if (number == kPhases) {  // more phases than any operation has
      for (long i = 0; i < n; i++) f(i);
      return;
    }
    Phase& phase = shared_->phases[number];
    phase.n = n;
    phase.context = &f;
    phase.call = [](const void* context, long i) { (*static_cast<const F*>(context))(i); };
    shared_->published.store(number + 1, std::memory_order_release);
    phase.work();
    for (long spins = 0; phase.finished.load(std::memory_order_acquire) < n; spins++) relax(spins);
  }

 private:
  static constexpr int kPhases = 8;

  static void relax(long spins) {
    if (spins < 4000) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }

  struct alignas(64) Phase {
    long n = 0;
    const void* context = nullptr;
    void (*call)(const void*, long) = nullptr;
    alignas(64) std::atomic<long> next{0};
    alignas(64) std::atomic<long> finished{0};

    void work() {
      for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        call(context, i);
        finished.fetch_add(1, std::memory_order_release);
      }
    }
  };

  struct Shared {
    Phase phases[kPhases];
    std::atomic<int> published{0};
    std::atomic<bool> done{false};

    void help() {
      int number = 0;
      for (long spins = 0; !done.load(std::memory_order_acquire);) {
        if (number < published.load(std::memory_order_acquire)) {
          phases[number++].work();
          spins = 0;
        } else {
          relax(spins++);
        }
      }
    }
  };

  std::shared_ptr<Shared> shared_;
};

}  // namespace sparsezoo

#endif  // SPARSEZOO_TEAM_H_
