#include "memory/kept_blocks.hpp"

#include <c10/core/CPUAllocator.h>
#include <fmt/format.h>
#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "tessera/error.hpp"

namespace tessera {

namespace {

constexpr size_t kLarge = size_t{1} << 20, kRounding = size_t{1} << 16;
constexpr size_t kHeader = 64;  // before the data: the block's size, and the alignment that vector loads want

struct Block {
  char* begin;
  size_t size;
};

class KeptBlocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    if (n < kLarge) {
      void* data = small_->raw_allocate(n);
      count(static_cast<int64_t>(::malloc_usable_size(data)));
      return {data, data, &KeptBlocks::free_small, c10::Device(c10::kCPU)};
    }
    const Block block = take(n);
    std::memcpy(block.begin, &block.size, sizeof block.size);
    char* data = block.begin + kHeader;
    {
      const std::lock_guard lock(mutex_);
      data_.insert(data);
    }
    return {data, data, &KeptBlocks::free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &KeptBlocks::free_any; }  // oneDNN asks for plain pointers
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

  LargeBlocks counts() {
    const std::lock_guard lock(mutex_);
    return counts_;
  }

  TensorBytes bytes() const { return {now_, most_}; }
  void forget_most() { most_ = now_.load(); }

  void release() {
    const std::lock_guard lock(mutex_);
    release_beyond(0);
    counts_.most = counts_.held;
  }

  static KeptBlocks& instance() {
    static KeptBlocks* const blocks = new KeptBlocks;  // never destroyed: tensors may outlive everything else
    return *blocks;
  }

 private:
  Block take(size_t n) {
    const size_t size = (n + kHeader + kRounding - 1) / kRounding * kRounding;
    const std::lock_guard lock(mutex_);
    // The one freed last that fits without much waste: its pages are likely still in the cache.
    for (auto it = kept_.rbegin(); it != kept_.rend(); ++it)
      if (it->size >= size && it->size - size <= size / 8) {
        const Block block = *it;
        kept_.erase(std::next(it).base());
        counts_.kept -= block.size;
        hold(block.size);
        return block;
      }
    const size_t most = std::max(counts_.most, counts_.held + size);
    release_beyond(most + static_cast<size_t>(kKeptShare * static_cast<double>(most)) - size);
    void* begin = map(size);
    if (begin == MAP_FAILED) release_beyond(0), begin = map(size);
    if (begin == MAP_FAILED)
      throw Error(ExitCode::kRuntime, fmt::format("out of memory: a tensor of {} bytes, beside {} bytes of others", n, counts_.held),
                  "a smaller local_batch_size or seq_len, or activation_checkpoint.mode = \"full\", needs less; `tessera plan` says how much");
    hold(size);
    return {static_cast<char*>(begin), size};
  }

  static void* map(size_t size) { return ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

  void count(int64_t size) {
    const int64_t now = now_ += size;
    for (int64_t most = most_; now > most && !most_.compare_exchange_weak(most, now);) {}
  }

  void hold(size_t size) {
    count(static_cast<int64_t>(size));
    counts_.held += size;
    counts_.most = std::max(counts_.most, counts_.held);
  }

  // Gives kept blocks back, those freed longest ago first, until all together are at most `limit`.
  void release_beyond(size_t limit) {
    size_t gone = 0;
    while (gone < kept_.size() && counts_.held + counts_.kept > limit) {
      counts_.kept -= kept_[gone].size;
      ::munmap(kept_[gone].begin, kept_[gone].size);
      ++gone;
    }
    kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(gone));
  }

  static void free(void* data) {
    KeptBlocks& self = instance();
    Block block{static_cast<char*>(data) - kHeader, 0};
    std::memcpy(&block.size, block.begin, sizeof block.size);
    const std::lock_guard lock(self.mutex_);
    self.data_.erase(data);
    self.counts_.held -= block.size;
    self.count(-static_cast<int64_t>(block.size));
    self.counts_.kept += block.size;
    self.kept_.push_back(block);
  }

  static void free_small(void* data) {
    instance().count(-static_cast<int64_t>(::malloc_usable_size(data)));
    instance().small_->raw_deallocate(data);
  }

  static void free_any(void* data) {
    KeptBlocks& self = instance();
    bool large;
    {
      const std::lock_guard lock(self.mutex_);
      large = self.data_.contains(data);
    }
    large ? free(data) : free_small(data);
  }

  c10::Allocator* const small_ = c10::GetDefaultCPUAllocator();
  std::mutex mutex_;
  std::vector<Block> kept_;  // in the order they were freed
  std::unordered_set<void*> data_;  // of the blocks that are held
  LargeBlocks counts_;
  std::atomic<int64_t> now_ = 0, most_ = 0;  // of all sizes
};

}  // namespace

void keep_large_blocks() {
#ifndef __SANITIZE_ADDRESS__  // which watches the ends of malloc's blocks
  if (c10::GetCPUAllocator() != &KeptBlocks::instance()) c10::SetCPUAllocator(&KeptBlocks::instance(), /*priority=*/1);
#endif
}

TensorBytes cpu_tensor_bytes() { return KeptBlocks::instance().bytes(); }
void forget_most_cpu_tensor_bytes() { KeptBlocks::instance().forget_most(); }

LargeBlocks large_blocks() { return KeptBlocks::instance().counts(); }

void release_kept_blocks() {
  KeptBlocks::instance().release();
  ::malloc_trim(0);
}

}  // namespace tessera
