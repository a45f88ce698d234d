// Stacks to switch between: each emulated thread runs on one.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

// DYNABERT_UCONTEXT: the system's switch, which makes system calls, where there is no other.
#if !defined(__x86_64__) && !defined(DYNABERT_UCONTEXT)
#define DYNABERT_UCONTEXT
#endif

#ifdef DYNABERT_UCONTEXT
#include <ucontext.h>
#else
extern "C" void dynabert_switch_stack(void** save, void* load);
// Saves what a call must keep and the stack pointer, takes the other stack's and returns into it.
// One copy in a program, however many files include this.
asm(R"(
.pushsection .text.dynabert_switch_stack,"axG",@progbits,dynabert_switch_stack,comdat
.weak dynabert_switch_stack
.type dynabert_switch_stack,@function
dynabert_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dynabert_switch_stack,.-dynabert_switch_stack
.popsection
)");
#endif

namespace dynabert::emulation {

// A place to continue at: of a fiber that is not running, or of the program that started them.
struct Context {
#ifdef DYNABERT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

inline void switch_context(Context& from, Context& to) {
#ifdef DYNABERT_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  dynabert_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
}

// Memory for stacks, kept for the next launch. Pages are taken when first touched, so the many
// threads of a large grid cost what they use.
class Stacks {
 public:
  static constexpr std::size_t kBytes = 128 * 1024;

  std::byte* take() {
    if (free_.empty()) grow();
    std::byte* stack = free_.back();
    free_.pop_back();
    *guard(stack) = kGuard;
    return stack;
  }
  // Whether the stack was large enough.
  bool give_back(std::byte* stack) {
    free_.push_back(stack);
    return *guard(stack) == kGuard;
  }

 private:
  static constexpr std::uint64_t kGuard = 0x6b636174734a5eed;

  static std::uint64_t* guard(std::byte* stack) { return reinterpret_cast<std::uint64_t*>(stack); }

  void grow() {
    constexpr std::size_t kCount = 128;
    void* memory = mmap(nullptr, kCount * kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    for (std::size_t i = kCount; i-- > 0;) {
      free_.push_back(static_cast<std::byte*>(memory) + i * kBytes);
    }
  }

  std::vector<std::byte*> free_;
};

inline Stacks stacks;

// Makes `context` begin with entry(), which must not return, on `stack`.
inline void prepare_context(Context& context, std::byte* stack, void (*entry)()) {
#ifdef DYNABERT_UCONTEXT
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack + 64;
  context.context.uc_stack.ss_size = Stacks::kBytes - 64;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
#else
  // As if entry() had been called: eight bytes off a multiple of 16, nobody to return to. Below,
  // its address for `ret` and six registers.
  void** top = reinterpret_cast<void**>(stack + Stacks::kBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

}  // namespace dynabert::emulation
