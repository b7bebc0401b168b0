// Team: threads that run the chunks of one parallel loop after another.
//
// An OpenMP team hands each thread an equal share and spins until the last one is done. Beside a busy process one of
// the threads is off its CPU for milliseconds, and all others wait for it in every loop. Here threads take small chunks
// when they run, and a thread that is off its CPU should hold none:
// * A thread takes the chunks of its own share first, because in a forward they read what its cache holds, and then
//   those of others. The calling thread takes part, and takes all of them if no other thread comes.
// * A worker gives its CPU away between two chunks, before the system takes it away in the middle of one.
// * A worker that finds itself on the caller's CPU moves to another: together they would run one after the other.
// * Threads without work spin for some milliseconds, then sleep, so that the system can use their CPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace treedecode::cpu {

class Team {
 public:
  using Function = void (*)(const void* context, int64_t chunk);

  // The team of this process. A process that forked has a team of its own.
  static Team& instance();

  // Calls function(context, i) for each i of [0, num_chunks) on up to num_threads threads, the caller's among them.
  // A call while another thread's loop is running takes the caller's thread alone. Rethrows an exception of a chunk
  // after all others have ended.
  void run(int64_t num_chunks, int num_threads, Function function, const void* context);

 private:
  // A thread's share of a loop: chunks [next, end). Others take from it too when theirs are done. One word, so that a
  // chunk is taken from the loop that its taker has seen.
  struct Share {
    static constexpr int64_t kMaxChunks = 0xffff;
    uint32_t loop;  // number of the loop
    uint16_t end;
    uint16_t next;
    uint64_t pack() const { return uint64_t{loop} << 32 | uint64_t{end} << 16 | next; }
    static Share unpack(uint64_t word) {
      return {static_cast<uint32_t>(word >> 32), static_cast<uint16_t>(word >> 16), static_cast<uint16_t>(word)};
    }
  };
  struct alignas(64) SharedWord {
    std::atomic<uint64_t> word{0};
  };
  static constexpr int kMaxThreads = 256;

  Team() = default;
  void resize(int num_workers);
  void work(int index);
  void wait_for_loop(int index, uint32_t seen);
  bool take(uint32_t loop, int thread, int64_t& chunk);
  void run_chunk(int64_t chunk);
  void wake(int64_t num_workers);
  void wait_for_others();

  std::mutex busy_;      // held by the caller while its loop runs
  int num_started_ = 0;  // workers, which are never ended
  uint32_t loop_ = 0;
  uint32_t num_chunks_ = 0;
  Function function_ = nullptr;
  const void* context_ = nullptr;
  // The caller's rounding and denormals, so that a chunk's results do not depend on its thread.
  uint32_t float_mode_ = 0;
  std::exception_ptr error_;
  std::mutex error_mutex_;
  SharedWord shares_[kMaxThreads];
  alignas(64) std::atomic<uint32_t> num_done_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};  // number of the last loop; idle workers wait for a change
  std::atomic<int> num_sleeping_{0};
  std::atomic<int> num_workers_{0};  // workers [0, num_workers_) take part
  std::atomic<int> caller_cpu_{-1};
};

}  // namespace treedecode::cpu
