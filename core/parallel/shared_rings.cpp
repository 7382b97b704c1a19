#include "parallel/shared_rings.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace tessera {

namespace {

constexpr uint64_t kRingBytes = 4 << 20;  // touched as far as they are used

struct alignas(64) Position {
  std::atomic<uint64_t> bytes;  // since the beginning
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// What two processes must have in common to share memory as ranks of one machine: a network too, so that containers count as machines.
std::string machine() {
  std::string text;
  for (const char* name : {"/proc/self/ns/pid", "/proc/self/ns/net", "/proc/self/ns/user"}) {
    char link[256];
    const ssize_t size = ::readlink(name, link, sizeof(link));
    text += std::string(link, static_cast<size_t>(std::max<ssize_t>(size, 0))) + " ";
  }
  char boot[64] = {};
  if (const int fd = ::open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC); fd >= 0) {
    const ssize_t size = ::read(fd, boot, sizeof(boot) - 1);
    text.append(boot, static_cast<size_t>(std::max<ssize_t>(size, 0)));
    ::close(fd);
  }
  return text;
}

}  // namespace

// What lies in shared memory: this, a Position for each reader, and the ring.
struct SharedRings::Ring {
  Position written;
  alignas(64) std::atomic<uint32_t> bell;  // changes with everything that the ring's owner may wait for
  std::atomic<uint32_t> sleeping;          // whether the owner waits for the bell
  std::atomic<uint32_t> left;              // the owner writes no more

  Position& read_by(int64_t rank) { return reinterpret_cast<Position*>(this + 1)[rank]; }
  char* bytes(int64_t size) { return reinterpret_cast<char*>(&read_by(size)); }
  static size_t mapped(int64_t size) { return sizeof(Ring) + static_cast<size_t>(size) * sizeof(Position) + kRingBytes; }
};

// In the ring: a header, then `in` whole; who reads skips what is not for it.
struct SharedRings::Transfer {
  at::Tensor in;
  std::vector<at::Tensor> received;
  std::vector<uint64_t> header;  // bytes of `in`; for each rank where its part begins, and its bytes
  uint64_t written = 0;          // of header and `in`
  struct Source {
    std::vector<uint64_t> header;
    uint64_t read = 0;           // of header and `in`
    bool done = false;
  };
  std::vector<Source> sources;
  int64_t missing = 0;           // sources that are not done
  uint64_t header_bytes() const { return header.size() * sizeof(uint64_t); }
};

SharedRings::SharedRings(int64_t rank, int64_t size, std::chrono::milliseconds timeout)
    : rank_(rank), size_(size), timeout_(timeout), rings_(static_cast<size_t>(size)), processes_(static_cast<size_t>(size), -1), reading_(static_cast<size_t>(size)) {}

SharedRings::Ring* SharedRings::map(int fd) const {
  void* memory = ::mmap(nullptr, Ring::mapped(size_), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<Ring*>(memory);
}

std::shared_ptr<SharedRings> SharedRings::meet(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t size, std::chrono::milliseconds timeout) {
  const auto say = [&](const char* what, int64_t of, const std::string& text) { store->set(fmt::format("rings/{}/{}", what, of), std::vector<uint8_t>(text.begin(), text.end())); };
  const auto hear = [&](const char* what, int64_t of) {
    const auto bytes = store->get(fmt::format("rings/{}/{}", what, of));
    return std::string(bytes.begin(), bytes.end());
  };
  std::shared_ptr<SharedRings> rings(new SharedRings(rank, size, timeout));
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  const int own = ::memfd_create("tessera-rank", MFD_CLOEXEC);
  bool good = own >= 0 && ::ftruncate(own, static_cast<off_t>(Ring::mapped(size))) == 0 && (rings->rings_[at(rank)] = rings->map(own));
  say("at", rank, fmt::format("{} {} {}", getpid(), own, good ? machine() : "nowhere"));
  for (int64_t r = 0; r < size && good; ++r) {
    const std::string there = hear("at", r);
    if (r == rank) continue;
    int process = -1, fd = -1, read = 0;
    good = std::sscanf(there.c_str(), "%d %d %n", &process, &fd, &read) == 2 && there.substr(static_cast<size_t>(read)) == machine();
    if (!good) break;
    const int theirs = ::open(fmt::format("/proc/{}/fd/{}", process, fd).c_str(), O_RDWR | O_CLOEXEC);
    struct stat info;
    good = theirs >= 0 && ::fstat(theirs, &info) == 0 && info.st_size == static_cast<off_t>(Ring::mapped(size)) && (rings->rings_[at(r)] = rings->map(theirs));
    if (theirs >= 0) ::close(theirs);
    rings->processes_[at(r)] = static_cast<int>(::syscall(SYS_pidfd_open, process, 0));
    good = good && rings->processes_[at(r)] >= 0;
  }
  say("good", rank, good ? "yes" : "no");
  if (rank == 0) {
    for (int64_t r = 1; r < size && good; ++r) good = hear("good", r) == "yes";
    say("shared", 0, good ? "yes" : "no");
  }
  good = hear("shared", 0) == "yes";
  if (own >= 0) ::close(own);
  return good ? rings : nullptr;
}

SharedRings::~SharedRings() {
  if (Ring* own = rings_[static_cast<size_t>(rank_)]) {
    own->left = 1;
    for (int64_t r = 0; r < size_; ++r)
      if (r != rank_ && rings_[static_cast<size_t>(r)]) ring_bell(r);
  }
  for (Ring* ring : rings_)
    if (ring) ::munmap(ring, Ring::mapped(size_));
  for (const int process : processes_)
    if (process >= 0) ::close(process);
}

void SharedRings::ring_bell(int64_t rank) {
  Ring& ring = *rings_[static_cast<size_t>(rank)];
  ring.bell.fetch_add(1);
  if (ring.sleeping.load()) ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&ring.bell), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

uint64_t SharedRings::most_unread() const {
  Ring& own = *rings_[static_cast<size_t>(rank_)];
  const uint64_t written = own.written.bytes.load(std::memory_order_relaxed);
  uint64_t most = 0;
  for (int64_t r = 0; r < size_; ++r)
    if (r != rank_) most = std::max(most, written - own.read_by(r).bytes.load(std::memory_order_acquire));
  return most;
}

bool SharedRings::write_some() {
  Ring& own = *rings_[static_cast<size_t>(rank_)];
  char* ring = own.bytes(size_);
  const uint64_t begin = own.written.bytes.load(std::memory_order_relaxed);
  uint64_t at = begin, space = kRingBytes - most_unread();
  while (!writing_.empty() && space > 0) {
    Transfer& t = *writing_.front();
    const uint64_t header = t.header_bytes(), total = header + t.header[0];
    while (t.written < total && space > 0) {
      const bool in_header = t.written < header;
      const char* from = in_header ? reinterpret_cast<const char*>(t.header.data()) + t.written : static_cast<const char*>(t.in.const_data_ptr()) + (t.written - header);
      const uint64_t n = std::min({(in_header ? header : total) - t.written, space, kRingBytes - at % kRingBytes});
      std::memcpy(ring + at % kRingBytes, from, n);
      at += n, t.written += n, space -= n;
    }
    if (t.written < total) break;
    t.in = at::Tensor();
    writing_.pop_front();
  }
  own.written.bytes.store(at, std::memory_order_release);
  return at != begin;
}

bool SharedRings::read_some(int64_t source) {
  auto& queue = reading_[static_cast<size_t>(source)];
  if (queue.empty()) return false;
  Ring& theirs = *rings_[static_cast<size_t>(source)];
  const char* ring = theirs.bytes(size_);
  Position& position = theirs.read_by(rank_);
  const uint64_t begin = position.bytes.load(std::memory_order_relaxed), written = theirs.written.bytes.load(std::memory_order_acquire);
  uint64_t at = begin;
  // Goes on by n bytes, which `to` gets unless it is nullptr.
  const auto take = [&](char* to, uint64_t n) {
    for (uint64_t done = 0; done < n;) {
      const uint64_t piece = std::min(n - done, kRingBytes - at % kRingBytes);
      if (to) std::memcpy(to + done, ring + at % kRingBytes, piece);
      done += piece, at += piece;
    }
  };
  while (!queue.empty() && at < written) {
    Transfer& t = *queue.front();
    Transfer::Source& from = t.sources[static_cast<size_t>(source)];
    const at::Tensor& into = t.received[static_cast<size_t>(source)];
    const uint64_t header = t.header_bytes();
    if (from.read < header) {
      const uint64_t n = std::min(header - from.read, written - at);
      take(reinterpret_cast<char*>(from.header.data()) + from.read, n);
      if ((from.read += n) < header) break;
      if (from.header[static_cast<size_t>(2 + 2 * rank_)] != into.nbytes())
        throw std::runtime_error(fmt::format("rank {} of the group sends {} bytes where {} are expected", source, from.header[static_cast<size_t>(2 + 2 * rank_)], into.nbytes()));
    }
    const uint64_t part = header + from.header[static_cast<size_t>(1 + 2 * rank_)], part_end = part + into.nbytes(), end = header + from.header[0];
    while (from.read < end && at < written) {
      const bool ours = from.read >= part && from.read < part_end;
      const uint64_t until = ours ? part_end : from.read < part && part < part_end ? part : end, n = std::min(until - from.read, written - at);
      take(ours ? static_cast<char*>(into.mutable_data_ptr()) + (from.read - part) : nullptr, n);
      from.read += n;
    }
    if (from.read < end) break;
    from.done = true, --t.missing;
    queue.pop_front();
  }
  position.bytes.store(at, std::memory_order_release);
  return at != begin;
}

// Writes and reads as much as can be.
void SharedRings::pump() {
  for (bool moved = true; moved;) {
    moved = write_some();
    if (moved)
      for (int64_t r = 0; r < size_; ++r)
        if (r != rank_) ring_bell(r);
    for (int64_t r = 0; r < size_; ++r)
      if (r != rank_ && read_some(r)) ring_bell(r), moved = true;
  }
}

SharedRings::TransferPtr SharedRings::start(const at::Tensor& in, const std::vector<at::Tensor>& sent, const std::vector<at::Tensor>& received) {
  auto t = std::make_shared<Transfer>();
  t->in = in, t->received = received;
  t->header.resize(static_cast<size_t>(1 + 2 * size_));
  t->header[0] = in.nbytes();
  t->sources.resize(static_cast<size_t>(size_));
  t->missing = size_ - 1;
  for (int64_t r = 0; r < size_; ++r) {
    const auto i = static_cast<size_t>(r);
    t->sources[i].header.resize(t->header.size());
    if (r == rank_) continue;
    t->header[1 + 2 * i] = sent[i].nbytes() ? static_cast<uint64_t>(static_cast<const char*>(sent[i].const_data_ptr()) - static_cast<const char*>(in.const_data_ptr())) : 0;
    t->header[2 + 2 * i] = sent[i].nbytes();
    reading_[i].push_back(t);
  }
  writing_.push_back(t);
  pump();
  return t;
}

// Both sides have to be there: whoever writes more than a ring holds waits for its readers.
void SharedRings::wait(Transfer& transfer) {
  Ring& own = *rings_[static_cast<size_t>(rank_)];
  const auto began = std::chrono::steady_clock::now();
  const auto done = [&] { return transfer.missing == 0 && !transfer.in.defined(); };
  for (;;) {
    const uint32_t bell = own.bell.load();
    pump();
    if (done()) return;
    check_others(transfer);
    if (std::chrono::steady_clock::now() - began > timeout_) throw std::runtime_error(fmt::format("timed out after {} s", timeout_.count() / 1000.0));
    own.sleeping = 1;
    const timespec most{.tv_sec = 0, .tv_nsec = 100'000'000};
    ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&own.bell), FUTEX_WAIT, bell, &most, nullptr, 0);
    own.sleeping = 0;
  }
}

// A rank that is gone has written all that it ever will; what it wrote before is read first.
void SharedRings::check_others(const Transfer& transfer) const {
  for (int64_t r = 0; r < size_; ++r) {
    const auto i = static_cast<size_t>(r);
    if (r == rank_ || (transfer.sources[i].done && !transfer.in.defined())) continue;
    pollfd process{.fd = processes_[i], .events = POLLIN, .revents = 0};
    const bool left = rings_[i]->left.load() != 0, ended = ::poll(&process, 1, 0) > 0;
    if (!left && !ended) continue;
    const uint64_t written = rings_[i]->written.bytes.load(std::memory_order_acquire);
    if (rings_[i]->read_by(rank_).bytes.load() == written) throw std::runtime_error(fmt::format("Connection closed by rank {} of the group, which has {}", r, ended ? "ended" : "left"));
  }
}

}  // namespace tessera
