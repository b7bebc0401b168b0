// A fiber: a stack, and switches to it. AddressSanitizer is told about both.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__)

// Not swapcontext, which makes a system call per switch: a block of 1024 threads switches a thousand times per barrier.
extern "C" void td_simt_switch(void** save, void* load);

class Registers {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(stack + size);
    *--top = 0;  // where a return address would be: entry never returns, but expects the stack misaligned by one
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;  // rbp, rbx, r12 .. r15
    *--top = 0x0000037f00001f80;             // x87 control word and mxcsr as a process starts with them
    sp_ = top;
  }
  void switch_to(Registers& to) { td_simt_switch(&sp_, to.sp_); }

 private:
  void* sp_ = nullptr;
};

#else

class Registers {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Registers& to) { swapcontext(&context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

class Fiber {
 public:
  // Starts a fiber, which need not have ended before.
  void start(char* stack, size_t size, void (*entry)()) {
    stack_ = stack;
    size_ = size;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, size);
    fake_ = nullptr;
#endif
    registers_.start(stack, size, entry);
  }

  // Called first in `entry`; `from` is the fiber that switched to this one.
  void entered(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.stack_, &from.size_);
#endif
  }

  // Switches to another fiber. Returns when a fiber switches back, and never if this one is `done`.
  void switch_to(Fiber& to, bool done = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(done ? nullptr : &fake_, to.stack_, to.size_);
    registers_.switch_to(to.registers_);
    __sanitizer_finish_switch_fiber(fake_, nullptr, nullptr);
#else
    registers_.switch_to(to.registers_);
#endif
  }

 private:
  Registers registers_;
  const void* stack_ = nullptr;
  size_t size_ = 0;
  void* fake_ = nullptr;
};

}  // namespace simt
