#include "tests/simt/simt.hpp"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kStack = 256 * 1024, kPage = 4096, kMostShared = 227 * 1024;

struct Failure {
  std::string text;
};

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  Place place{};
  int number = 0;
  State state = State::kReady;
  std::vector<Copy> open;                 // copies since the last commit
  std::deque<std::vector<Copy>> groups;   // committed, not waited for
  ucontext_t start{};
  jmp_buf at{};
  bool started = false;
  unsigned char* stack = nullptr;
};

struct Warp {
  int arrived = 0;
  const char* operation = nullptr;
  const void* in[32];
  void* out[32];
};

// Memory between two pages without rights; what is asked for ends at the upper one.
struct Guarded {
  explicit Guarded(size_t most) : bytes((most + kPage - 1) / kPage * kPage) {
    base = static_cast<unsigned char*>(mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(base + kPage, bytes, PROT_READ | PROT_WRITE);
  }
  ~Guarded() { munmap(base, bytes + 2 * kPage); }
  Guarded(const Guarded&) = delete;
  unsigned char* end() const { return base + kPage + bytes; }
  bool near(const void* p) const { return p >= base && p < base + bytes + 2 * kPage; }
  size_t bytes;
  unsigned char* base;
};

struct Machine {
  std::string name, error;
  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Guarded>> stacks;
  std::vector<Warp> warps;
  std::vector<int> ready;
  std::mt19937 random;
  Fiber* running = nullptr;
  jmp_buf scheduler{};
  Guarded shared{kMostShared};
  size_t shared_bytes = 0;
  int threads = 0, done = 0, at_block = 0, sum = 0, last_sum = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* own_stack = nullptr;
  size_t own_stack_bytes = 0;
#endif

  unsigned char* shared_begin() const { return shared.end() - (shared_bytes + 127) / 128 * 128; }
};

Machine& machine() {
  static thread_local Machine m;
  return m;
}

[[noreturn]] void fail(const std::string& what) { throw Failure{what}; }

// Between scheduler and fiber. No local variable lives across them.
__attribute__((noinline)) void to_scheduler(Machine& m, Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, m.own_stack, m.own_stack_bytes);
#endif
  if (_setjmp(f.at) == 0) _longjmp(m.scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &m.own_stack, &m.own_stack_bytes);
#endif
}

__attribute__((noinline)) void to_fiber(Machine& m, Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, kStack);
#endif
  if (_setjmp(m.scheduler) == 0) {
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    setcontext(&f.start);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void block(State state) {
  Machine& m = machine();
  Fiber& f = *m.running;
  f.state = state;
  to_scheduler(m, f);
}

// A fiber's whole life: the kernel once a block.
void live() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine().own_stack, &machine().own_stack_bytes);
#endif
  for (;;) {
    Machine& m = machine();
    try {
      (*m.kernel)();
    } catch (const Failure& failure) {
      if (m.error.empty()) m.error = failure.text;
    }
    m.running->open.clear();
    m.running->groups.clear();
    ++m.done;
    block(State::kDone);
  }
}

void make_ready(Machine& m, Fiber& f) {
  f.state = State::kReady;
  m.ready.push_back(f.number);
}

std::string where(const Fiber& f) {
  const auto& p = f.place;
  return "block " + std::to_string(p.block.x) + "," + std::to_string(p.block.y) + "," + std::to_string(p.block.z) + " thread " + std::to_string(f.number);
}

// All fibers have stopped and the block cannot go on.
std::string stuck(const Machine& m) {
  std::string text = std::to_string(m.at_block) + " of " + std::to_string(m.threads) + " threads wait at __syncthreads, " + std::to_string(m.done) + " have returned";
  for (const Warp& w : m.warps)
    if (w.arrived > 0) {
      text += ", " + std::to_string(w.arrived) + " lanes of warp " + std::to_string(&w - m.warps.data()) + " wait at " + w.operation;
      break;
    }
  return text;
}

void run_block(Machine& m) {
  std::memset(m.shared_begin(), 0xff, static_cast<size_t>(m.shared.end() - m.shared_begin()));
  m.warps.assign(static_cast<size_t>(m.threads / 32), Warp{});
  m.ready.clear();
  m.done = m.at_block = m.sum = 0;
  for (int t = 0; t < m.threads; ++t) make_ready(m, *m.fibers[static_cast<size_t>(t)]);
  while (!m.ready.empty() && m.error.empty()) {
    const size_t pick = m.random() % m.ready.size();
    std::swap(m.ready[pick], m.ready.back());
    m.running = m.fibers[static_cast<size_t>(m.ready.back())].get();
    m.ready.pop_back();
    to_fiber(m, *m.running);
  }
  m.running = nullptr;
  if (m.error.empty() && m.done < m.threads) m.error = stuck(m);
}

void prepare_fibers(Machine& m) {
  while (static_cast<int>(m.fibers.size()) < m.threads) {
    m.fibers.push_back(std::make_unique<Fiber>());
    m.stacks.push_back(std::make_unique<Guarded>(kStack));
    Fiber& f = *m.fibers.back();
    f.number = static_cast<int>(m.fibers.size()) - 1;
    f.stack = m.stacks.back()->end() - kStack;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack;
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, live, 0);
  }
}

// Names the kernel before a bad access ends the program.
void on_fault(int number, siginfo_t* info, void*) {
  Machine& m = machine();
  if (m.running) {
    const bool shared = m.shared.near(info->si_addr);
    const std::string text = "simt: kernel " + m.name + ": " + where(*m.running) + ": access " + (shared ? "outside its shared memory" : "to memory that is not there") + "\n";
    if (write(2, text.data(), text.size()) < 0) _exit(3);
  }
  signal(number, SIG_DFL);
  raise(number);
}

void watch_faults() {
#if !defined(__SANITIZE_ADDRESS__)
  static const bool once = [] {
    static unsigned char stack[64 * 1024];
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof(stack);
    sigaltstack(&alternate, nullptr);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    return true;
  }();
  (void)once;
#endif
}

// "kernel<a, b>, grid, ..." up to the comma that ends the name.
std::string kernel_name(const char* text) {
  int depth = 0;
  const char* end = text;
  for (; *end && !(*end == ',' && depth == 0); ++end) depth += (*end == '<' || *end == '(') - (*end == '>' || *end == ')');
  std::string name(text, end);
  if (name.size() > 1 && name.front() == '(' && name.back() == ')') name = name.substr(1, name.size() - 2);
  return name;
}

unsigned seed() {
  static const char* const word = std::getenv("TESSERA_SIMT_SEED");
  return word ? static_cast<unsigned>(std::atoi(word)) : 1;
}

void check_shared(const Machine& m, const void* p, size_t bytes, const char* what) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < m.shared_begin() || at + bytes > m.shared_begin() + m.shared_bytes) fail(std::string(what) + " outside the " + std::to_string(m.shared_bytes) + " bytes of dynamic shared memory");
}

float from_bf16(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

}  // namespace

const char* run(const char* text, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  m.error.clear();
  const int64_t threads = int64_t{block.x} * block.y * block.z, blocks = int64_t{grid.x} * grid.y * grid.z;
  m.name = kernel_name(text);
  if (blocks == 0) return nullptr;
  const auto refuse = [&](const std::string& what) {
    m.error = "kernel " + m.name + ": " + what;
    return m.error.c_str();
  };
  if (threads < 32 || threads > 1024 || threads % 32 != 0) return refuse("a block must be 1 to 32 whole warps, got " + std::to_string(threads) + " threads");
  if (shared_bytes > most_shared_memory()) return refuse("a block has at most " + std::to_string(most_shared_memory()) + " bytes of shared memory, got " + std::to_string(shared_bytes));
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) return refuse("a grid is at most 2147483647 x 65535 x 65535");
  watch_faults();
  m.kernel = &kernel;
  m.threads = static_cast<int>(threads);
  m.shared_bytes = shared_bytes;
  m.random.seed(seed());
  prepare_fibers(m);
  // Blocks in an order that no kernel may rely on: from a random one on, by a step that visits all.
  const int64_t first = static_cast<int64_t>(m.random() % static_cast<uint64_t>(blocks));
  for (int64_t k = 0; k < blocks && m.error.empty(); ++k) {
    const int64_t b = ((first - k) % blocks + blocks) % blocks;
    for (int t = 0; t < m.threads; ++t) {
      const auto n = static_cast<unsigned>(t);
      m.fibers[static_cast<size_t>(t)]->place = {
          .thread = {n % block.x, n / block.x % block.y, n / (block.x * block.y)},
          .block = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y), static_cast<unsigned>(b / (int64_t{grid.x} * grid.y))},
          .block_dim = block,
          .grid_dim = grid};
    }
    run_block(m);
  }
  if (m.error.empty()) return nullptr;
  m.fibers.clear();  // some stand in the middle of the kernel
  m.stacks.clear();
  return refuse(std::string(m.error));
}

size_t most_shared_memory() {
  static const char* const word = std::getenv("TESSERA_SIMT_SHARED_KB");
  return word ? std::min<size_t>(kMostShared, static_cast<size_t>(std::atoi(word)) * 1024) : kMostShared;
}

const Place& here() { return machine().running->place; }
unsigned char* shared_memory() { return machine().shared_begin(); }

int sync_block_sum(int value) {
  Machine& m = machine();
  m.sum += value;
  if (++m.at_block < m.threads) {
    block(State::kAtBlock);
    return m.last_sum;
  }
  m.last_sum = m.sum;
  m.at_block = m.sum = 0;
  for (auto& f : m.fibers)
    if (f->state == State::kAtBlock && f.get() != m.running) make_ready(m, *f);
  return m.last_sum;
}
void sync_block() { sync_block_sum(0); }

void meet(const char* operation, const void* in, void* out, void (*all)(const void* const* in, void* const* out)) {
  Machine& m = machine();
  Fiber& f = *m.running;
  Warp& w = m.warps[static_cast<size_t>(f.number / 32)];
  const int lane = f.number % 32;
  if (w.arrived > 0 && std::strcmp(w.operation, operation) != 0) fail(where(f) + " is at " + operation + " while others of its warp wait at " + w.operation);
  w.operation = operation;
  w.in[lane] = in;
  w.out[lane] = out;
  if (++w.arrived < 32) return block(State::kAtWarp);
  w.arrived = 0;
  all(w.in, w.out);
  for (int other = 0; other < 32; ++other)
    if (other != lane) make_ready(m, *m.fibers[static_cast<size_t>(f.number / 32 * 32 + other)]);
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(where(*machine().running) + ": access of " + std::to_string(bytes) + " bytes at an address that is not a multiple");
}

uint16_t round_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (std::isnan(v)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace {

// Operands in fp32: a two a register pair, b likewise.
struct Product {
  float *d, a[8], b[4];
};

void multiply(const void* const* in, void* const*) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const Product*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 8; ++r) a[g + 8 * (r / 2 % 2)][2 * t + 8 * (r / 4) + r % 2] = p.a[r];
    for (int r = 0; r < 4; ++r) b[2 * t + 8 * (r / 2) + r % 2][g] = p.b[r];
  }
  float sums[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sums[m][n] = std::fma(a[m][k], b[k][n], sums[m][n]);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const Product*>(in[lane]);
    for (int r = 0; r < 4; ++r) p.d[r] += sums[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
  }
}

struct Rows {
  uint32_t* registers;
  const void* row;
  int matrices;
  bool transposed;
};

void load_matrices(const void* const* in, void* const*) {
  const auto& first = *static_cast<const Rows*>(in[0]);
  for (int i = 0; i < first.matrices; ++i) {
    uint16_t e[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(e[r], static_cast<const Rows*>(in[8 * i + r])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, c = 2 * (lane % 4);
      const uint32_t low = first.transposed ? e[c][r] : e[r][c], high = first.transposed ? e[c + 1][r] : e[r][c + 1];
      static_cast<const Rows*>(in[lane])->registers[i] = low | high << 16;
    }
  }
}

}  // namespace

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product mine{.d = d, .a = {}, .b = {}};
  for (int r = 0; r < 8; ++r) mine.a[r] = from_bf16(a[r / 2] >> 16 * (r % 2) & 0xffff);
  for (int r = 0; r < 4; ++r) mine.b[r] = from_bf16(b[r / 2] >> 16 * (r % 2) & 0xffff);
  meet("mma", &mine, nullptr, multiply);
}

void mma_f32(float (&d)[4], const float (&a)[8], const float (&b)[4]) {
  Product mine{.d = d, .a = {}, .b = {}};
  std::copy_n(a, 8, mine.a);
  std::copy_n(b, 4, mine.b);
  meet("fp32 product", &mine, nullptr, multiply);
}

void ldmatrix(uint32_t* registers, int matrices, const void* row, bool transposed) {
  const Machine& m = machine();
  if (m.running->number % 32 < 8 * matrices) {
    check_aligned(row, 16);
    check_shared(m, row, 16, "ldmatrix");
  }
  const Rows mine{registers, row, matrices, transposed};
  static constexpr const char* kNames[2][5] = {{"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"},
                                               {"", "ldmatrix.x1.trans", "ldmatrix.x2.trans", "", "ldmatrix.x4.trans"}};
  meet(kNames[transposed][matrices], &mine, nullptr, load_matrices);
}

void cp_async16(void* to_shared, const void* from, int bytes) {
  check_aligned(to_shared, 16);
  check_shared(machine(), to_shared, 16, "cp.async");
  if (bytes < 0 || bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
  if (bytes > 0) check_aligned(from, 16);
  machine().running->open.push_back({static_cast<unsigned char*>(to_shared), from, bytes});
}
void cp_async_commit() {
  Fiber& f = *machine().running;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
void cp_async_wait(int pending) {
  Fiber& f = *machine().running;
  for (; static_cast<int>(f.groups.size()) > pending; f.groups.pop_front())
    for (const Copy& copy : f.groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
}

}  // namespace simt
