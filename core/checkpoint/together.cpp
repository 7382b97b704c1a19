#include "checkpoint/together.hpp"

#include <fmt/format.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "parallel/rendezvous.hpp"
#include "tessera/error.hpp"

namespace tessera {

using nlohmann::json;

namespace {

std::vector<uint8_t> bytes_of(const json& value) {
  const std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  return {text.begin(), text.end()};
}

}  // namespace

Together::Together(const MeshGroups* ranks) {
  if (!ranks || !ranks->all()) return;
  const World& world = ranks->world();
  rank_ = world.rank, size_ = world.size, timeout_ = world.timeout;
  store_ = c10::make_intrusive<c10d::PrefixStore>("together", world.store->clone());
}

Together::~Together() = default;

json Together::take(const std::string& key, std::chrono::milliseconds timeout) const {
  store_->wait({key}, timeout);
  const std::vector<uint8_t> bytes = store_->get(key);
  store_->deleteKey(key);
  return json::parse(bytes.begin(), bytes.end());
}

json Together::exchange(const json& own) const {
  const auto word_of = [](int64_t rank) { return fmt::format("word/{}", rank); };
  const auto all_for = [](int64_t rank) { return fmt::format("all/{}", rank); };
  if (rank_ != 0) {
    store_->set(word_of(rank_), bytes_of(own));
    return take(all_for(rank_), 2 * timeout_);  // the first rank, which knows who is missing, gives up before
  }
  json all = json::array();
  all.push_back(own);
  for (int64_t rank = 1; rank < size_; ++rank) {
    try {
      all.push_back(take(word_of(rank), timeout_));
    } catch (const std::exception& error) {
      throw Error(ExitCode::kCollective, fmt::format("rank {} did not come to a save within {} s: {}", rank, timeout_.count() / 1000, first_line(error)));
    }
  }
  for (int64_t rank = 1; rank < size_; ++rank) store_->set(all_for(rank), bytes_of(all));
  return all;
}

std::vector<json> Together::round(const std::function<json()>& part) const {
  if (!store_) return {part()};
  json own;
  try {
    own["word"] = part();
  } catch (const Error& error) {
    own = {{"failure", error.message()}, {"help", error.help()}};
  } catch (const std::exception& error) {
    own = {{"failure", first_line(error)}, {"help", ""}};
  }
  json all;
  try {
    all = exchange(own);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(ExitCode::kCollective, fmt::format("rank {} lost the others in a save: {}", rank_, first_line(error)));
  }
  std::vector<json> words;
  for (json& said : all) {
    if (said.contains("failure")) throw Error(ExitCode::kRuntime, said["failure"].get<std::string>(), said["help"].get<std::string>());
    words.push_back(std::move(said["word"]));
  }
  return words;
}

}  // namespace tessera
