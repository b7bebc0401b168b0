#include "team.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace treedecode::cpu {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// Longer than the host's work between two forwards. To wake a thread that sleeps costs little on bare metal, but in a
// virtual machine, which gives an idle CPU back, several hundred microseconds.
constexpr microseconds kSpin{3000}, kActiveSpin{20000};
// Linux lets a thread run for 0.7 ms and more before another may have its CPU.
constexpr microseconds kTurn{300};

// Returns how long a thread without work spins: OMP_WAIT_POLICY is heard, as by the loops of torch.
microseconds spin_time() {
  static const microseconds time = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    const auto is = [&](const char* a, const char* b) {
      return policy != nullptr && (std::strcmp(policy, a) == 0 || std::strcmp(policy, b) == 0);
    };
    return is("PASSIVE", "passive") ? microseconds{0} : is("ACTIVE", "active") ? kActiveSpin : kSpin;
  }();
  return time;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done`, at most spin_time(). Returns whether it is done.
template <typename Done>
bool spin_until(const Done& done) {
  const auto end = Clock::now() + spin_time();
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return done();
}

uint32_t float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;  // without the flags of exceptions
#else
  return 0;
#endif
}

void set_float_mode(uint32_t mode) {
#if defined(__x86_64__)
  if (float_mode() != mode) _mm_setcsr(mode);
#endif
}

#if defined(__linux__)

int current_cpu() { return sched_getcpu(); }

// Moves the calling thread off a CPU. `excluded` is the one that an earlier call has taken from its mask, or -1.
// Returns false if there is no other CPU.
bool move_off(int cpu, int& excluded) {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return false;
  if (excluded >= 0) CPU_SET(excluded, &mask);
  CPU_CLR(cpu, &mask);
  if (CPU_COUNT(&mask) == 0 || sched_setaffinity(0, sizeof mask, &mask) != 0) return false;
  excluded = cpu;
  return true;
}

// Asks for short turns (Linux 6.12), so that a thread that waits for its CPU gets it sooner. Its share stays the same.
void ask_for_short_turns() {
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 || attributes.policy != SCHED_OTHER) return;
  attributes.runtime = 100000;  // ns
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

void prepare_worker() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals are the user's threads' business
  pthread_setname_np(pthread_self(), "treedecode");
  ask_for_short_turns();
}

#else

int current_cpu() { return -1; }
bool move_off(int, int&) { return true; }
void prepare_worker() {}

#endif

Team* the_team = nullptr;

}  // namespace

Team& Team::instance() {
  // Never destroyed: its threads may run until the process ends. In a forked child they do not exist.
  static const bool once = [] {
    the_team = new Team;
#if defined(__linux__)
    pthread_atfork(nullptr, nullptr, [] { the_team = new Team; });
#endif
    return true;
  }();
  (void)once;
  return *the_team;
}

void Team::resize(int num_workers) {
  while (num_started_ < num_workers) {
    try {
      std::thread(&Team::work, this, num_started_).detach();
    } catch (const std::system_error&) {
      break;  // the system allows no more threads: those that there are do all of the work
    }
    ++num_started_;
  }
  if (num_workers_.exchange(num_workers, std::memory_order_acq_rel) != num_workers) num_workers_.notify_all();
}

bool Team::take(uint32_t loop, int thread, int64_t& chunk) {
  const int num_threads = num_workers_.load(std::memory_order_relaxed) + 1;
  for (int i = 0; i < num_threads; ++i) {
    std::atomic<uint64_t>& shared = shares_[(thread + i) % num_threads].word;
    uint64_t word = shared.load(std::memory_order_acquire);
    for (Share share; (share = Share::unpack(word)).loop == loop && share.next < share.end;) {
      if (shared.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) {
        chunk = share.next;
        return true;
      }
    }
  }
  return false;
}

void Team::run_chunk(int64_t chunk) {
  try {
    function_(context_, chunk);
  } catch (...) {
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void Team::wait_for_loop(int index, uint32_t seen) {
  for (int n; (n = num_workers_.load(std::memory_order_acquire)) <= index;) num_workers_.wait(n);
  if (spin_until([&] { return signal_.load(std::memory_order_acquire) != seen; })) return;
  num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
  signal_.wait(seen, std::memory_order_seq_cst);
  num_sleeping_.fetch_sub(1, std::memory_order_relaxed);
}

void Team::work(int index) {
  prepare_worker();
  uint32_t seen = 0;
  int excluded_cpu = -1;
  auto turn_end = Clock::now() + kTurn;
  while (true) {
    wait_for_loop(index, seen);
    seen = signal_.load(std::memory_order_acquire);
    while (true) {
      const int cpu = caller_cpu_.load(std::memory_order_relaxed);
      if (cpu >= 0 && cpu == current_cpu() && !move_off(cpu, excluded_cpu)) break;
      if (Clock::now() > turn_end) {
        std::this_thread::yield();
        turn_end = Clock::now() + kTurn;
      }
      int64_t chunk;
      if (!take(seen, index + 1, chunk)) break;
      set_float_mode(float_mode_);
      const uint32_t num_chunks = num_chunks_;
      run_chunk(chunk);
      if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_chunks) num_done_.notify_one();
    }
  }
}

void Team::wake(int64_t num_workers) {
  if (num_sleeping_.load(std::memory_order_seq_cst) == 0) return;
  if (num_workers > 2) {
    signal_.notify_all();
  } else {
    for (int64_t i = 0; i < num_workers; ++i) signal_.notify_one();
  }
}

void Team::wait_for_others() {
  const auto done = [&] { return num_done_.load(std::memory_order_acquire) == num_chunks_; };
  if (spin_until(done)) return;
  // The caller's CPU is free now for the thread that has the last chunk.
  for (uint32_t n; (n = num_done_.load(std::memory_order_acquire)) != num_chunks_;) num_done_.wait(n);
}

void Team::run(int64_t num_chunks, int num_threads, Function function, const void* context) {
  const std::unique_lock lock(busy_, std::try_to_lock);
  num_threads = std::min(num_threads, kMaxThreads);
  if (!lock || num_threads <= 1 || num_chunks <= 1 || num_chunks > Share::kMaxChunks) {
    for (int64_t i = 0; i < num_chunks; ++i) function(context, i);
    return;
  }
  resize(num_threads - 1);
  function_ = function;
  context_ = context;
  num_chunks_ = static_cast<uint32_t>(num_chunks);
  float_mode_ = float_mode();
  caller_cpu_.store(current_cpu(), std::memory_order_relaxed);
  num_done_.store(0, std::memory_order_relaxed);
  ++loop_;
  for (int64_t t = 0; t < num_threads; ++t) {
    const Share share{loop_, static_cast<uint16_t>(num_chunks * (t + 1) / num_threads),
                      static_cast<uint16_t>(num_chunks * t / num_threads)};
    shares_[t].word.store(share.pack(), std::memory_order_release);
  }
  signal_.store(loop_, std::memory_order_seq_cst);
  wake(std::min<int64_t>(num_threads, num_chunks) - 1);
  // The caller counts its own chunks once, at the end.
  uint32_t num_own = 0;
  for (int64_t chunk; take(loop_, 0, chunk); ++num_own) run_chunk(chunk);
  if (num_done_.fetch_add(num_own, std::memory_order_acq_rel) + num_own != num_chunks_) wait_for_others();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace treedecode::cpu
