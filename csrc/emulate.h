// A GPU block on the CPU: every thread of the block is a fiber, every kernel of csrc/ runs unchanged.
//
// Built with -DCUMO_EMULATE by g++ alone, this replaces the CUDA runtime (platform.cuh). It is as strict as the hardware
// may be: shared memory starts as NaN; cp.async, TMA and wgmma take effect as late as their waits allow; threads run in
// ascending order in even blocks and descending in odd ones; a barrier or a warp instruction that not all its threads
// reach is an error, not a hang; so is a thread that does not wait for earlier kernels.
//
// One launch at a time: the caller holds Python's lock.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace cumo::emulate {

struct Index {
  unsigned x = 0;
};

constexpr int kStackBytes = 256 * 1024;
constexpr int kGuardBytes = 4096;

// Threads that wait for one another: a barrier, or an instruction that a warp or a warpgroup executes together.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
  const char* what = nullptr;
  std::vector<void*> arguments;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  std::vector<std::function<void()>> open;                // cp.async since the last commit
  std::deque<std::vector<std::function<void()>>> groups;  // committed, not yet waited for
};

class Machine {
 public:
  Index thread, block, blocks, threads;
  unsigned char* shared = nullptr;  // 1024-byte aligned
  int shared_bytes = 0;
  std::deque<std::function<void()>> late;  // TMA copies: delivered when no thread can continue
  int64_t waited = 0;                      // threads of the kernel that have waited for earlier ones
  const char* fetched = nullptr;           // the end of what the kernel has prefetched

  void run(int num_blocks, int num_threads, int bytes, std::function<void()> body) {
    body_ = std::move(body);
    blocks.x = num_blocks;
    threads.x = num_threads;
    shared_bytes = bytes;
    memory_.resize(bytes + 1024 + kGuardBytes);
    shared = memory_.data() + (1024 - reinterpret_cast<uintptr_t>(memory_.data()) % 1024) % 1024;
    while (static_cast<int>(fibers_.size()) < num_threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack.reset(new char[kStackBytes]);
    }
    for (int b = 0; b < num_blocks; ++b) run_block(b);
  }

  Fiber& fiber() { return *fibers_[thread.x]; }

  template <class Ready>
  void wait(const char* what, Ready ready) {
    while (!ready()) {
      waiting_for_ = what;
      pause();
    }
    ++progress_;
  }

  // The last of `size` threads to arrive runs `act` on the arguments of all; then all continue.
  template <class Act>
  void meet(Meeting& meeting, int size, int rank, const char* what, void* argument, Act act) {
    if (meeting.arrived == 0) {
      meeting.what = what;
      meeting.arguments.assign(size, nullptr);
    } else if (meeting.what != what) {
      fail(std::string("threads of one group are at different places: ") + meeting.what + " and " + what);
    }
    meeting.arguments[rank] = argument;
    ++progress_;
    if (++meeting.arrived == size) {
      act(meeting.arguments.data());
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    const unsigned generation = meeting.generation;
    wait(what, [&] { return meeting.generation != generation; });
  }

  Meeting& warp() { return warps_[thread.x / 32]; }
  Meeting& warpgroup() { return warpgroups_[thread.x / 128]; }

  void barrier(int id, int size) {
    Meeting& meeting = barriers_[id];
    if (meeting.arrived == 0) meeting.what = "barrier";
    ++progress_;
    if (++meeting.arrived == size) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    const unsigned generation = meeting.generation;
    wait("barrier", [&] { return meeting.generation != generation; });
  }

  [[noreturn]] void fail(const std::string& message) {
    error_ = message;
    _longjmp(scheduler_, 1);
  }

 private:
  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  static void enter() {
    Machine* machine = current();
    machine->body_();
    machine->fiber().done = true;
    ++machine->progress_;
    _longjmp(machine->scheduler_, 1);
  }

  void pause() {
    const unsigned me = thread.x;
    if (_setjmp(fiber().state) == 0) _longjmp(scheduler_, 1);
    thread.x = me;
  }

  void resume(unsigned index) {
    thread.x = index;
    Fiber& next = *fibers_[index];
    if (_setjmp(scheduler_) != 0) return;
    if (next.started) _longjmp(next.state, 1);
    next.started = true;
    setcontext(&next.start);
  }

  void run_block(int b) {
    current() = this;
    block.x = b;
    std::memset(shared, 0xff, shared_bytes + kGuardBytes);
    warps_.assign((threads.x + 31) / 32, {});
    warpgroups_.assign((threads.x + 127) / 128, {});
    barriers_.assign(16, {});
    late.clear();
    error_.clear();
    for (unsigned t = 0; t < threads.x; ++t) {
      Fiber& fiber = *fibers_[t];
      fiber.started = fiber.done = false;
      fiber.open.clear();
      fiber.groups.clear();
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStackBytes;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, &Machine::enter, 0);
    }
    for (;;) {
      const uint64_t before = progress_;
      bool alive = false;
      for (unsigned i = 0; i < threads.x; ++i) {
        const unsigned t = b % 2 ? threads.x - 1 - i : i;
        if (fibers_[t]->done) continue;
        alive = true;
        resume(t);
        if (!error_.empty()) throw std::runtime_error(where(b) + error_);
      }
      if (!alive) break;
      if (progress_ != before) continue;
      if (late.empty()) throw std::runtime_error(where(b) + "no thread can continue; the last waits for " + waiting_for_);
      auto copy = std::move(late.front());
      late.pop_front();
      copy();
    }
    if (!late.empty()) throw std::runtime_error(where(b) + "the block ended before a copy that it began");
    for (int i = 0; i < kGuardBytes; ++i)
      if (shared[shared_bytes + i] != 0xff) throw std::runtime_error(where(b) + "a write past shared memory");
  }

  static std::string where(int b) { return "emulated block " + std::to_string(b) + ": "; }

  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> warps_, warpgroups_, barriers_;
  std::vector<unsigned char> memory_;
  jmp_buf scheduler_;
  uint64_t progress_ = 0;
  const char* waiting_for_ = "";
  std::string error_;
};

inline Machine machine;

}  // namespace cumo::emulate

inline cumo::emulate::Index& threadIdx = cumo::emulate::machine.thread;
inline cumo::emulate::Index& blockIdx = cumo::emulate::machine.block;
inline cumo::emulate::Index& gridDim = cumo::emulate::machine.blocks;
inline cumo::emulate::Index& blockDim = cumo::emulate::machine.threads;
