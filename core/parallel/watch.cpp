#include "parallel/watch.hpp"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <pthread.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "parallel/rendezvous.hpp"
#include "tessera/error.hpp"

namespace tessera {

namespace {

using nlohmann::json;
using std::chrono::milliseconds;

constexpr const char* kPrefix = "watch";
constexpr int64_t kLauncher = -1;  // as the one who told a failure, and tells the user of it
constexpr milliseconds kBeat{500};
// Counted in beats of one's own, so that machines that were suspended together find each other alive.
constexpr int kBeatsToLoss = 20;
constexpr int kBeatsToAsk = 6;
constexpr milliseconds kMoment{2000};     // for the work to fail by itself
constexpr milliseconds kGoodbye{5000};    // for the others to have read why
constexpr int kSecondsToEnd = 15;         // for a rank that has failed to unwind
constexpr int kSecondsWithoutStore = 60;  // before a store that neither answers nor refuses is gone

std::vector<uint8_t> bytes_of(const json& value) {
  const std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  return {text.begin(), text.end()};
}

std::string store_name(const c10::intrusive_ptr<c10d::Store>& store) {
  const auto* prefixed = dynamic_cast<c10d::PrefixStore*>(store.get());
  const auto inner = prefixed ? const_cast<c10d::PrefixStore*>(prefixed)->getUnderlyingNonPrefixStore() : store;
  const auto* tcp = dynamic_cast<c10d::TCPStore*>(inner.get());
  return tcp ? fmt::format("{} port {}", tcp->getHost(), tcp->getPort()) : "this process";
}

}  // namespace

struct Watch::Shared {
  struct Reached {
    std::string group;
    uint64_t number = 0;
    const char* collective = "";
    std::string place;
  };
  struct Failure {
    int64_t rank = 0, by = 0;  // who failed, who told it
    std::string reason;
  };
  enum class State { kWorking, kDone, kFailed };

  const int64_t rank, size, local_rank;
  const std::shared_ptr<Whereabouts> whereabouts;
  const c10::intrusive_ptr<c10d::Store> store;
  const std::string served_at;

  std::mutex mutex;  // of what follows
  std::condition_variable changed;
  std::optional<Mesh> mesh;
  std::map<std::string, Reached> reached;  // by group
  Reached last;
  State state = State::kWorking;
  bool stopping = false;
  bool acknowledged = false;
  uint64_t beats = 0;
  std::string own_error;
  int own_code = 0;

  std::mutex publishing;
  std::thread beating, guarding;

  explicit Shared(const World& world)
      : rank(world.rank), size(world.size), local_rank(world.local_rank), whereabouts(world.whereabouts),
        store(c10::make_intrusive<c10d::PrefixStore>(kPrefix, world.store->clone())), served_at(store_name(world.store)) {}

  // What identifies a group on all its members: groups of one name do not overlap.
  static std::string key(const Group& group) { return fmt::format("{}:{}", group.name(), group.ranks().front()); }
  static std::string beat_key(int64_t rank) { return fmt::format("rank/{}", rank); }

  std::string place_of_rank(int64_t at) {
    const std::lock_guard lock(mutex);
    return mesh ? place_text(*mesh, at) : fmt::format("rank {}", at);
  }

  void arrived(const Group& group, uint64_t number, const char* collective) {
    const std::lock_guard lock(mutex);
    last = reached[key(group)] = {.group = group.name(), .number = number, .collective = collective, .place = whereabouts->place};
  }

  void publish() {
    const std::lock_guard order(publishing);
    json beat;
    {
      const std::lock_guard lock(mutex);
      beat["beat"] = ++beats;
      beat["ended"] = acknowledged || state != State::kWorking;
      if (*last.collective) beat["at"] = fmt::format("{} number {} over {}{}", last.collective, last.number, last.group, last.place.empty() ? "" : " in " + last.place);
      for (const auto& [name, at] : reached) beat["reached"][name] = at.number;
    }
    store->set(beat_key(rank), bytes_of(beat));
  }

  std::optional<json> read(const std::string& name) {
    if (!store->check({name})) return {};
    const auto bytes = store->get(name);
    return json::parse(bytes.begin(), bytes.end());
  }
  // What a rank said last; of one that said nothing yet, a beat of 0.
  json read_beat(int64_t of) { return read(beat_key(of)).value_or(json{{"beat", 0}, {"ended", false}}); }

  std::optional<Failure> read_failure() {
    const auto told = read("failure");
    if (!told) return {};
    return Failure{.rank = told->at("rank").get<int64_t>(), .by = told->at("by").get<int64_t>(), .reason = told->at("reason").get<std::string>()};
  }
  // The first failure counts: this one, where none was told before.
  static Failure tell(c10d::Store& store, const Failure& failure) {
    const auto first = store.compareSet("failure", {}, bytes_of({{"rank", failure.rank}, {"by", failure.by}, {"reason", failure.reason}}));
    const json told = json::parse(first.begin(), first.end());
    return {.rank = told.at("rank").get<int64_t>(), .by = told.at("by").get<int64_t>(), .reason = told.at("reason").get<std::string>()};
  }
  Failure tell(const Failure& failure) { return tell(*store, failure); }
  // Whether this rank tells the user of a failure that is not its own.
  bool speaks(const Failure& failure) const { return failure.by == rank || (local_rank == 0 && failure.by != kLauncher); }
  std::string sentence(const Failure& failure) {
    return fmt::format("{} {}{}", place_of_rank(failure.rank), failure.by == failure.rank ? "ended: " : "", failure.reason);
  }
  std::string lost(int beats_without) {
    return fmt::format("gave no sign of life for {} s: it was killed, or its machine or network is gone", std::chrono::duration_cast<std::chrono::seconds>(beats_without * kBeat).count());
  }
  std::string store_gone() { return fmt::format("the store at {} does not answer any more: rank 0 or the launcher, which served it, has ended", served_at); }

  // Ends this process on another's account, unless the work ends by itself first.
  void end_soon(const std::string& message, bool tell_it) {
    std::unique_lock lock(mutex);
    acknowledged = true;
    lock.unlock();
    try {
      publish();
    } catch (const std::exception&) {  // the store may be what is gone
    }
    lock.lock();
    if (changed.wait_for(lock, kMoment, [&] { return stopping || state != State::kWorking; })) return;
    end_now(tell_it ? Error(ExitCode::kCollective, message).what() : "", static_cast<int>(ExitCode::kCollective));
  }
  [[noreturn]] static void end_now(const std::string& text, int code) {
    const std::string block = text.empty() ? "" : (isatty(STDERR_FILENO) ? "\n" : "") + text + "\n";  // below a progress line
    (void)!::write(STDERR_FILENO, block.data(), block.size());
    ::_exit(code);
  }

  bool sleep(milliseconds time) {
    std::unique_lock lock(mutex);
    return !changed.wait_for(lock, time, [&] { return stopping; });
  }

  void beat() {
    // Each rank looks after the next that has not ended.
    int64_t next = (rank + 1) % size;
    uint64_t heard = 0;
    int silent = 0;
    try {
      do {
        publish();
        if (const auto failure = read_failure()) {
          if (failure->by != rank || failure->rank != rank) end_soon(sentence(*failure), speaks(*failure));
          return;
        }
        const json there = read_beat(next);
        const auto count = there.at("beat").get<uint64_t>();
        if (there.at("ended").get<bool>()) {
          next = (next + 1) % size, heard = 0, silent = 0;
          if (next == rank) next = (next + 1) % size;
        } else if (count != heard) {
          heard = count, silent = 0;
        } else if (++silent >= kBeatsToLoss) {
          const Failure failure = tell({.rank = next, .by = rank, .reason = lost(kBeatsToLoss)});
          end_soon(sentence(failure), speaks(failure));
          return;
        }
      } while (sleep(kBeat));
    } catch (const std::exception&) {
      end_soon(store_gone(), true);
    }
  }

  // A store that hangs holds up the beat, and a work that hangs while it unwinds holds up the end.
  void guard() {
    uint64_t seen = 0;
    int same = 0, failed = 0;
    while (sleep(std::chrono::seconds(1))) {
      std::unique_lock lock(mutex);
      same = beats == seen ? same + 1 : 0;
      seen = beats;
      if (state == State::kFailed && ++failed >= kSecondsToEnd) end_now(own_error, own_code);
      if (state == State::kWorking && !acknowledged && same >= kSecondsWithoutStore) {
        lock.unlock();
        end_now(Error(ExitCode::kCollective, store_gone()).what(), static_cast<int>(ExitCode::kCollective));
      }
    }
  }

  std::string missing(const Group& group, uint64_t number) {
    try {
      std::string own;
      {
        const std::lock_guard lock(mutex);
        own = reached[key(group)].collective;
      }
      const bool one_to_one = own == "send" || own == "receive";  // each rank has numbers of its own
      std::map<int64_t, uint64_t> began;
      std::vector<std::string> who;
      for (int asked = 0; asked <= kBeatsToAsk; ++asked) {
        if (const auto failure = read_failure(); failure && failure->by != rank) return sentence(*failure);
        who.clear();
        for (const int64_t other : group.ranks()) {
          if (other == rank) continue;
          const json there = read_beat(other);
          const auto count = there.at("beat").get<uint64_t>();
          const auto [first, added] = began.try_emplace(other, count);
          if (added) continue;
          const json at = there.value("reached", json::object());
          const std::string name = key(group), reached_text = there.contains("at") ? ", it is at " + there.at("at").get<std::string>() : ", nor at any collective";
          const bool behind = !at.contains(name) || at.at(name).get<uint64_t>() < number;
          if (there.at("ended").get<bool>()) who.push_back(fmt::format("{} has ended", place_of_rank(other)));
          else if (count == first->second) who.push_back(fmt::format("{} {}", place_of_rank(other), lost(asked)));
          else if (one_to_one) who.push_back(fmt::format("{}{}", place_of_rank(other), reached_text.substr(1)));
          else if (behind) who.push_back(fmt::format("{} has not arrived{}", place_of_rank(other), reached_text));
        }
        if (asked < kBeatsToAsk) std::this_thread::sleep_for(kBeat);
      }
      return fmt::format("{}", fmt::join(who, "; "));
    } catch (const std::exception&) {
      return store_gone();
    }
  }

  // Tells the others. Returns the failure that came before this one.
  std::optional<Failure> fail(const Error& error) {
    {
      const std::lock_guard lock(mutex);
      state = State::kFailed;
      own_error = error.message().empty() ? "" : error.what();
      own_code = static_cast<int>(error.code());
    }
    changed.notify_all();
    try {
      publish();
      if (error.message().empty()) return {};
      const std::string& message = error.message();
      const Failure first = tell({.rank = rank, .by = rank, .reason = message.substr(0, message.find('\n'))});
      if (rank == 0) wait_for_others(kGoodbye);
      if (first.by != rank || first.rank != rank) return first;
    } catch (const std::exception&) {  // the error at hand is the one to tell
    }
    return {};
  }

  void done() {
    {
      const std::lock_guard lock(mutex);
      state = State::kDone;
    }
    try {
      publish();
      if (rank == 0) wait_for_others({});
    } catch (const std::exception&) {  // this rank's work is done whatever became of the store
    }
  }

  // Until every other rank has ended or is lost; without `most`, also until one has failed.
  void wait_for_others(std::optional<milliseconds> most) {
    constexpr milliseconds kPause{50};
    const auto pauses_to_loss = kBeatsToLoss * kBeat / kPause;
    milliseconds waited{0};
    for (int64_t other = 0; other < size; ++other) {
      uint64_t heard = 0;
      for (int64_t silent = 0; other != rank && silent < pauses_to_loss; waited += kPause) {
        if (most ? waited >= *most : read_failure().has_value()) return;
        const json there = read_beat(other);
        if (there.at("ended").get<bool>()) break;
        const auto count = there.at("beat").get<uint64_t>();
        silent = count == heard ? silent + 1 : 0;
        heard = count;
        std::this_thread::sleep_for(kPause);
      }
    }
  }
};

Watch::Watch(const World& world) {
  if (world.size == 1 || !world.store) return;
  try {
    shared_ = std::make_unique<Shared>(world);
  } catch (const std::exception& error) {
    throw Error(ExitCode::kCollective, fmt::format("rank {}: the store at {} failed: {}", world.rank, store_name(world.store), first_line(error)));
  }
  Shared* shared = shared_.get();
  world.whereabouts->arrived = [shared](const Group& group, uint64_t number, const char* collective) { shared->arrived(group, number, collective); };
  world.whereabouts->missing = [shared](const Group& group, uint64_t number) { return shared->missing(group, number); };
  // Signals are the main thread's.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  shared_->beating = std::thread([shared] { shared->beat(); });
  shared_->guarding = std::thread([shared] { shared->guard(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Watch::~Watch() {
  if (!shared_) return;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->stopping = true;
  }
  shared_->changed.notify_all();
  shared_->beating.join();
  shared_->guarding.join();
  shared_->whereabouts->arrived = nullptr;
  shared_->whereabouts->missing = nullptr;
}

void Watch::set_mesh(const Mesh& mesh) {
  if (!shared_) return;
  const std::lock_guard lock(shared_->mutex);
  shared_->mesh = mesh;
}

void Watch::tell(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, const std::string& reason) {
  c10d::PrefixStore prefixed(kPrefix, store);
  Shared::tell(prefixed, {.rank = rank, .by = kLauncher, .reason = reason});
}

int Watch::run(const std::function<int()>& work) {
  if (!shared_) return work();
  const auto told = [&](const Error& error) { return shared_->fail(error); };
  try {
    const int code = work();
    shared_->done();
    return code;
  } catch (const Error& error) {
    const auto first = told(error);
    if (!first || error.code() != ExitCode::kCollective) throw;
    // A collective that failed because another rank did.
    if (shared_->local_rank == 0 || first->by == shared_->rank) throw Error(ExitCode::kCollective, error.message(), error.help());
    throw Error(ExitCode::kCollective, "");
  } catch (const std::bad_alloc&) {
    told(Error(ExitCode::kRuntime, "out of memory"));
    throw;
  } catch (const c10::Error& error) {
    told(Error(ExitCode::kRuntime, fmt::format("libtorch: {}", first_line(error))));
    throw;
  } catch (const std::exception& error) {
    told(Error(ExitCode::kRuntime, error.what()));
    throw;
  }
}

}  // namespace tessera
