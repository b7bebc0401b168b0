#include "self_test.h"

#include "../../csrc/cuda/common/collectives.cuh"
#include "../../csrc/cuda/common/launch.cuh"
#include "../../csrc/cuda/common/scans.cuh"

namespace treedecode::cuda {
namespace {

constexpr int kMaxThreads = 1024;

__global__ void _reverse_kernel(const ToyParams p) {
  TD_SHARED(int32_t, values, kMaxThreads);
  values[ptx::thread()] = p.in[ptx::thread()];
  ptx::sync_threads();
  p.out[ptx::thread()] = values[p.num_threads - 1 - ptx::thread()];
}

__global__ void _divergence_kernel(const ToyParams p) {
  const int32_t value = p.in[ptx::thread()];
  if (ptx::lane() % 2) p.out[ptx::thread()] = ptx::shfl(value, 0);
  else p.out[ptx::thread()] = static_cast<int32_t>(ptx::ballot(value != 0));
}

__global__ void _two_barriers_kernel(const ToyParams p) {
  if (ptx::thread() % 2) {
    ptx::sync_threads();
  } else {
    ptx::sync_threads();
  }
}

// The second warp waits for a third one.
__global__ void _deadlock_kernel(const ToyParams p) {
  if (ptx::warp() == 1) ptx::named_barrier_sync(1, 64);
}

__global__ void _early_exit_kernel(const ToyParams p) {
  if (ptx::lane() == 7) return;
  p.out[ptx::thread()] = ptx::any(p.in[ptx::thread()] != 0);
}

__global__ void _unwritten_kernel(const ToyParams p) {
  TD_SHARED(int32_t, values, kMaxThreads);
  p.out[ptx::thread()] = values[ptx::thread()] + ptx::dynamic_shared<int32_t>()[ptx::thread()];
}

// The second half waits for its copy, the first does not.
__global__ void _cp_async_kernel(const ToyParams p) {
  auto* values = ptx::dynamic_shared<int32_t>();
  const int i = ptx::thread();
  ptx::cp_async<4>(values + i, p.in + i, i % 4 != 1);
  ptx::cp_async_commit();
  if (i >= p.num_threads / 2) ptx::cp_async_wait<0>();
  p.out[i] = values[i];
}

// Warp 0 hands a value to each other warp through a named barrier that it does not wait at.
__global__ void _hand_over_kernel(const ToyParams p) {
  TD_SHARED(int32_t, values, kMaxThreads);
  if (ptx::warp() == 0) {
    for (int i = ptx::thread(); i < p.num_threads; i += ptx::kWarpSize) values[i] = p.in[i] + 1;
    for (int w = 1; w < p.num_threads / ptx::kWarpSize; ++w) ptx::named_barrier_arrive(w, 64);
    p.out[ptx::thread()] = values[ptx::thread()];
  } else {
    ptx::named_barrier_sync(ptx::warp(), 64);
    p.out[ptx::thread()] = values[ptx::thread()];
  }
}

// Counts blocks in out[0]; the last one to arrive sees the writes of all others.
__global__ void _last_block_kernel(const ToyParams p) {
  TD_SHARED(bool, is_last, 1);
  if (ptx::thread() == 0) p.out[1 + ptx::block_x()] = static_cast<int32_t>(ptx::block_x()) + 1;
  ptx::thread_fence();
  ptx::sync_threads();
  if (ptx::thread() == 0) is_last[0] = ptx::atomic_add(p.out, 1) == p.num_blocks - 1;
  ptx::sync_threads();
  if (!is_last[0] || ptx::thread() != 0) return;
  int32_t sum = 0;
  for (int i = 0; i < p.num_blocks; ++i) sum += p.out[1 + i];
  p.out[1 + p.num_blocks] = sum;
}

// Each warp waits for the one after it; the last one waits for nobody, or for `num_blocks` warps more.
__global__ void _poll_kernel(const ToyParams p) {
  const int next = ptx::warp() + 1;
  if (ptx::lane() == 0 && next < p.num_threads / ptx::kWarpSize + p.num_blocks - 1) {
    while (ptx::atomic_add(p.out + next, 0) != next) ptx::back_off();
  }
  ptx::sync_warp();
  if (ptx::lane() == 0) ptx::atomic_exch(p.out + ptx::warp(), ptx::warp());
}

// Calls it twice in a row, because the second use of its shared memory needs a barrier.
__global__ void _scan_kernel(const ToyParams p) {
  const auto first = block_scan(p.in[ptx::thread()]);
  const auto second = block_scan(p.in[ptx::thread()] * 2);
  p.out[ptx::thread()] = first.before + second.before + first.total + second.total;
}

__global__ void _scans_kernel(const ToyParams p) {
  const int32_t in = p.in[ptx::thread()];
  int32_t out = 0;
  for (int round = 1; round <= 2; ++round) {
    int32_t values[2] = {round * in, 10 * round * in};
    const int32_t* totals = block_scans(values);
    out += values[0] + values[1] + totals[0] + totals[1];
  }
  p.out[ptx::thread()] = out;
}

// Runs every atomic, on shared and global memory, 32 and 64 bits. The results do not depend on the order.
__global__ void _atomics_kernel(const ToyParams p) {
  TD_SHARED(uint64_t, wide, 3);
  TD_SHARED(int32_t, narrow, 2);
  const int i = ptx::thread();
  if (i < 3) wide[i] = i == 1 ? ~uint64_t{0} : 0;
  if (i < 2) narrow[i] = 0;
  ptx::sync_threads();
  ptx::atomic_add(&wide[0], (uint64_t{1} << 32) + 1);
  ptx::atomic_min(&wide[1], static_cast<uint64_t>(p.in[i]) << 32);
  ptx::atomic_max(&wide[2], static_cast<uint64_t>(p.in[i]) << 32);
  ptx::atomic_min(&narrow[0], -p.in[i]);
  while (ptx::atomic_cas(&narrow[1], i, i + 1) != i) ptx::back_off();
  ptx::atomic_add(&p.out[5], p.in[i]);
  ptx::thread_fence();
  ptx::sync_threads();
  if (i != 0) return;
  for (int k = 0; k < 3; ++k) p.out[k] = static_cast<int32_t>(wide[k] >> 32);
  p.out[3] = narrow[0];
  p.out[4] = narrow[1];
  p.out[6] = ptx::popc(wide[0]) + ptx::popc(static_cast<uint32_t>(p.in[2])) + ptx::clz(wide[0]) + ptx::clz(1u) +
             ptx::lowest_bit(8u);
}

// Runs the remaining names: 16-byte copies and loads, arithmetic, and the order of kernels.
__global__ void _wide_kernel(const ToyParams p) {
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();
  auto* tile = ptx::dynamic_shared<ptx::Bytes16>();
  const auto* in = reinterpret_cast<const ptx::Bytes16*>(p.in);
  const int i = ptx::thread();
  if (i < p.num_threads / 4) {
    ptx::cp_async<16>(tile + i, in + i);
    ptx::cp_async_commit();
    ptx::cp_async<8>(p.num_threads / 4 + tile, in, false);  // nothing waits for it
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    const ptx::Bytes16 direct = ptx::load_once(in + i);
    for (int k = 0; k < 4; ++k) p.out[4 * i + k] = static_cast<int32_t>(tile[i].word[k] + direct.word[k]);
  }
  const float one = ptx::exp2_approx(0.0f) * ptx::rcp_approx(1.0f) + ptx::log2_approx(1.0f);
  const auto round_trip = ptx::to_float(ptx::from_float<bf16>(ptx::to_float(ptx::from_float<fp16>(1.5f))));
  const auto sum = ptx::fma(one, round_trip, static_cast<float>(ptx::shfl_down(i, 1) - ptx::shfl_up(i, 1)));
  if (!ptx::all(ptx::lane() == 0 || ptx::lane() == 31 || sum == 3.5f)) p.out[0] = -1;
  const uint64_t far = ptx::shfl_xor(static_cast<uint64_t>(i) << 40, 1);
  if (ptx::any(far >> 40 != static_cast<uint64_t>(i ^ 1))) p.out[0] = -2;
  ptx::named_barrier_sync(3, ptx::num_threads());
}

template <typename T>
__global__ void _fragments_kernel(const FragmentParams p) {
  TD_SHARED(uint16_t, a_tile, 16 * 16);
  TD_SHARED(uint16_t, b_tile, 16 * 8);
  const int lane = ptx::lane();
  for (int i = lane; i < 256; i += 32) a_tile[i] = p.a[i];
  for (int i = lane; i < 128; i += 32) b_tile[i] = p.b[i];
  ptx::sync_warp();
  uint32_t a[4], b[4];
  ptx::ldmatrix_x4(a, a_tile + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4_trans(b, b_tile + lane % 16 * 8);
  for (int i = 0; i < 4; ++i) p.elements[lane * 4 + i] = a[i];
  float d[4] = {};
  const uint32_t b_pair[2] = {b[0], b[1]};
  ptx::mma_m16n8k16<T>(d, a, b_pair);
  for (int i = 0; i < 4; ++i) p.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

cudaError_t run_toy(void (*kernel)(ToyParams), const ToyParams& p, cudaStream_t stream) {
  return launch(kernel, {static_cast<uint32_t>(p.num_blocks)}, p.num_threads,
                static_cast<size_t>(p.num_threads) * sizeof(int32_t), stream, p);
}

}  // namespace

cudaError_t toy_reverse(const ToyParams& p, cudaStream_t stream) { return run_toy(&_reverse_kernel, p, stream); }
cudaError_t toy_divergence(const ToyParams& p, cudaStream_t stream) { return run_toy(&_divergence_kernel, p, stream); }
cudaError_t toy_two_barriers(const ToyParams& p, cudaStream_t stream) {
  return run_toy(&_two_barriers_kernel, p, stream);
}
cudaError_t toy_deadlock(const ToyParams& p, cudaStream_t stream) { return run_toy(&_deadlock_kernel, p, stream); }
cudaError_t toy_early_exit(const ToyParams& p, cudaStream_t stream) { return run_toy(&_early_exit_kernel, p, stream); }
cudaError_t toy_unwritten(const ToyParams& p, cudaStream_t stream) { return run_toy(&_unwritten_kernel, p, stream); }
cudaError_t toy_cp_async(const ToyParams& p, cudaStream_t stream) { return run_toy(&_cp_async_kernel, p, stream); }
cudaError_t toy_hand_over(const ToyParams& p, cudaStream_t stream) { return run_toy(&_hand_over_kernel, p, stream); }
cudaError_t toy_last_block(const ToyParams& p, cudaStream_t stream) { return run_toy(&_last_block_kernel, p, stream); }
cudaError_t toy_poll(const ToyParams& p, cudaStream_t stream) { return run_toy(&_poll_kernel, p, stream); }
cudaError_t toy_scan(const ToyParams& p, cudaStream_t stream) { return run_toy(&_scan_kernel, p, stream); }
cudaError_t toy_scans(const ToyParams& p, cudaStream_t stream) { return run_toy(&_scans_kernel, p, stream); }
cudaError_t toy_atomics(const ToyParams& p, cudaStream_t stream) { return run_toy(&_atomics_kernel, p, stream); }
cudaError_t toy_wide(const ToyParams& p, cudaStream_t stream) {
  return launch_dependent(&_wide_kernel, {}, p.num_threads, (p.num_threads / 4 + 1) * sizeof(ptx::Bytes16), stream, p);
}
cudaError_t toy_fragments(const FragmentParams& p, cudaStream_t stream) {
  return p.is_bf16 ? launch(&_fragments_kernel<bf16>, {1}, 32, 0, stream, p)
                   : launch(&_fragments_kernel<fp16>, {1}, 32, 0, stream, p);
}

}  // namespace treedecode::cuda
