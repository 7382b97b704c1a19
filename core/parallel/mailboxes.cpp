#include "parallel/mailboxes.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
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

#include "parallel/rendezvous.hpp"

namespace tessera {

namespace {

constexpr uint64_t kBoxBytes = uint64_t{64} << 30;  // of addresses; memory is taken as far as it is used
constexpr uint64_t kSlots = 4096;                   // exchanges that may be in flight
constexpr uint64_t kAlign = 64;

uint64_t aligned(uint64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

struct alignas(kAlign) Count {
  std::atomic<uint64_t> exchanges;  // since the beginning
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// What two processes must have in common to share memory as ranks of one machine: a network too, so that containers count as machines.
std::string sharing_identity() {
  std::string text = network_identity();
  for (const char* name : {"/proc/self/ns/pid", "/proc/self/ns/user"}) {
    char link[64] = "";
    (void)!::readlink(name, link, sizeof link - 1);
    text = text + "\n" + link;
  }
  return text;
}

}  // namespace

// What lies in shared memory: this, a Count for each reader, and what is sent. Of an exchange that is a header, the bytes of `in` and, for each rank, where
// its part of them begins and ends, and then those bytes.
struct Mailboxes::Box {
  Count put;
  alignas(kAlign) std::atomic<uint32_t> bell;  // changes when another rank has put something down or leaves
  std::atomic<uint32_t> sleeping;              // whether the owner waits for the bell
  std::atomic<uint32_t> left;                  // the owner puts nothing down any more
  uint64_t places[kSlots];                     // of an exchange, by its number modulo kSlots

  Count& taken_by(int64_t rank) { return reinterpret_cast<Count*>(this + 1)[rank]; }
  char* bytes(int64_t size) { return reinterpret_cast<char*>(&taken_by(size)); }
  static size_t mapped(int64_t size) { return sizeof(Box) + static_cast<size_t>(size) * sizeof(Count) + kBoxBytes; }
};

Mailboxes::Mailboxes(int64_t rank, int64_t size, std::chrono::milliseconds timeout)
    : rank_(rank), size_(size), timeout_(timeout), boxes_(static_cast<size_t>(size)), processes_(static_cast<size_t>(size), -1), expected_(static_cast<size_t>(size)) {}

Mailboxes::Box* Mailboxes::map(int fd) const {
  void* memory = ::mmap(nullptr, Box::mapped(size_), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<Box*>(memory);
}

std::shared_ptr<Mailboxes> Mailboxes::meet(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t size, std::chrono::milliseconds timeout) {
  const auto say = [&](const char* what, int64_t of, const std::string& text) { store->set(fmt::format("boxes/{}/{}", what, of), std::vector<uint8_t>(text.begin(), text.end())); };
  const auto hear = [&](const char* what, int64_t of) {
    const auto bytes = store->get(fmt::format("boxes/{}/{}", what, of));
    return std::string(bytes.begin(), bytes.end());
  };
  const std::string here = sharing_identity();
  std::shared_ptr<Mailboxes> boxes(new Mailboxes(rank, size, timeout));
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  const int own = ::memfd_create("tessera-rank", MFD_CLOEXEC);
  rlimit most_bytes{};  // a file beyond it would be a signal
  ::getrlimit(RLIMIT_FSIZE, &most_bytes);
  bool good = own >= 0 && most_bytes.rlim_cur >= Box::mapped(size) && ::ftruncate(own, static_cast<off_t>(Box::mapped(size))) == 0 && (boxes->boxes_[at(rank)] = boxes->map(own));
  say("at", rank, fmt::format("{} {} {}", getpid(), own, good ? here : "nowhere"));
  for (int64_t r = 0; r < size && good; ++r) {
    const std::string there = hear("at", r);
    if (r == rank) continue;
    int process = -1, fd = -1, read = 0;
    good = std::sscanf(there.c_str(), "%d %d %n", &process, &fd, &read) == 2 && there.substr(static_cast<size_t>(read)) == here;
    if (!good) break;
    const int theirs = ::open(fmt::format("/proc/{}/fd/{}", process, fd).c_str(), O_RDWR | O_CLOEXEC);
    struct stat info;
    good = theirs >= 0 && ::fstat(theirs, &info) == 0 && info.st_size == static_cast<off_t>(Box::mapped(size)) && (boxes->boxes_[at(r)] = boxes->map(theirs));
    if (theirs >= 0) ::close(theirs);
    boxes->processes_[at(r)] = static_cast<int>(::syscall(SYS_pidfd_open, process, 0));
    good = good && boxes->processes_[at(r)] >= 0;
  }
  say("good", rank, good ? "yes" : "no");
  if (rank == 0) {
    for (int64_t r = 1; r < size && good; ++r) good = hear("good", r) == "yes";
    say("shared", 0, good ? "yes" : "no");
  }
  good = hear("shared", 0) == "yes";
  if (own >= 0) ::close(own);
  return good ? boxes : nullptr;
}

Mailboxes::~Mailboxes() {
  if (boxes_[static_cast<size_t>(rank_)]) {
    box(rank_).left = 1;
    for (int64_t r = 0; r < size_; ++r)
      if (r != rank_ && boxes_[static_cast<size_t>(r)]) ring_bell(r);
  }
  for (Box* each : boxes_)
    if (each) ::munmap(each, Box::mapped(size_));
  for (const int process : processes_)
    if (process >= 0) ::close(process);
}

void Mailboxes::ring_bell(int64_t rank) const {
  Box& other = box(rank);
  other.bell.fetch_add(1);
  if (other.sleeping.load()) ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&other.bell), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Where so many bytes lie free, first of all in what everyone has taken.
uint64_t Mailboxes::place(uint64_t bytes) {
  Box& own = box(rank_);
  uint64_t all = started_;
  for (int64_t r = 0; r < size_; ++r)
    if (r != rank_) all = std::min(all, own.taken_by(r).exchanges.load(std::memory_order_acquire));
  std::erase_if(lying_, [&](const auto& entry) { return entry.second.second < all; });
  uint64_t at = 0;
  for (const auto& [begin, end_of] : lying_) {
    if (begin - at >= bytes) break;
    at = end_of.first;
  }
  if (at + bytes > kBoxBytes || lying_.size() == kSlots)
    throw std::runtime_error(fmt::format("{} exchanges are in flight, of {} bytes: more than may be", lying_.size() + 1, at + bytes));
  lying_[at] = {at + bytes, started_};
  return at;
}

uint64_t Mailboxes::start(const at::Tensor& in, const std::vector<at::Tensor>& sent, std::vector<at::Tensor> received) {
  std::vector<uint64_t> header{in.nbytes()};
  for (int64_t r = 0; r < size_; ++r) {
    const at::Tensor& part = sent[static_cast<size_t>(r)];
    const bool any = r != rank_ && part.nbytes() > 0;
    const uint64_t begin = any ? static_cast<uint64_t>(static_cast<const char*>(part.const_data_ptr()) - static_cast<const char*>(in.const_data_ptr())) : 0;
    header.insert(header.end(), {begin, begin + (any ? part.nbytes() : 0)});
  }
  Box& own = box(rank_);
  const uint64_t header_bytes = aligned(header.size() * sizeof(uint64_t)), at = place(header_bytes + aligned(in.nbytes()));
  char* to = own.bytes(size_) + at;
  std::memcpy(to, header.data(), header.size() * sizeof(uint64_t));
  if (in.nbytes()) std::memcpy(to + header_bytes, in.const_data_ptr(), in.nbytes());
  own.places[started_ % kSlots] = at;
  own.put.exchanges.store(started_ + 1, std::memory_order_release);
  for (int64_t r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    expected_[static_cast<size_t>(r)].push_back({started_, std::move(received[static_cast<size_t>(r)])});
    ring_bell(r);
  }
  return started_++;
}

// Takes what a rank has put down for this one, in its order, as far as the exchange with this number; false where that is not there yet.
bool Mailboxes::take(int64_t source, uint64_t number) {
  auto& expected = expected_[static_cast<size_t>(source)];
  Box& theirs = box(source);
  while (!expected.empty() && expected.front().number <= number) {
    const Exchange& next = expected.front();
    if (theirs.put.exchanges.load(std::memory_order_acquire) <= next.number) return false;
    const char* from = theirs.bytes(size_) + theirs.places[next.number % kSlots];
    std::vector<uint64_t> header(static_cast<size_t>(1 + 2 * size_));
    std::memcpy(header.data(), from, header.size() * sizeof(uint64_t));
    const uint64_t begin = header[static_cast<size_t>(1 + 2 * rank_)], end = header[static_cast<size_t>(2 + 2 * rank_)];
    if (end - begin != next.into.nbytes())
      throw std::runtime_error(fmt::format("rank {} of the group sends {} bytes where {} are expected", source, end - begin, next.into.nbytes()));
    if (begin < end) std::memcpy(next.into.mutable_data_ptr(), from + aligned(header.size() * sizeof(uint64_t)) + begin, end - begin);
    theirs.taken_by(rank_).exchanges.store(next.number + 1, std::memory_order_release);
    expected.pop_front();
  }
  return true;
}

void Mailboxes::wait(uint64_t number) {
  Box& own = box(rank_);
  const auto began = std::chrono::steady_clock::now();
  for (int64_t r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    for (;;) {
      const uint32_t bell = own.bell.load();
      pollfd process{.fd = processes_[static_cast<size_t>(r)], .events = POLLIN, .revents = 0};
      if (take(r, number)) break;
      const bool left = box(r).left.load() != 0, ended = ::poll(&process, 1, 0) > 0;
      if (take(r, number)) break;  // what it put down before
      if (left || ended) throw std::runtime_error(fmt::format("Connection closed by rank {} of the group, which has {}", r, ended ? "ended" : "left"));
      if (std::chrono::steady_clock::now() - began > timeout_) throw std::runtime_error(fmt::format("timed out after {} s", static_cast<double>(timeout_.count()) / 1000));
      own.sleeping = 1;
      const timespec most{.tv_sec = 0, .tv_nsec = 100'000'000};
      ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&own.bell), FUTEX_WAIT, bell, &most, nullptr, 0);
      own.sleeping = 0;
    }
  }
}

}  // namespace tessera
