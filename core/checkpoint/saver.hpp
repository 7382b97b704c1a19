// Saves of checkpoints: written aside, flushed and renamed into place, so that a crash at any instant leaves the last complete one.
#pragma once
#include <atomic>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <string>

#include "checkpoint/checkpoint.hpp"

namespace tessera {

// Saves a model and its optimizer (which may be nullptr), one save at a time; of several ranks each has a Saver, and all save the same. What it is given
// outlives it.
class Saver {
 public:
  // `in_background`: a save copies this rank's tensors into host memory, which is kept for the next, and returns; a thread writes them.
  Saver(const Config& config, const Registry& registry, Store& store, Optimizer* optimizer, bool in_background = false);
  ~Saver();  // waits
  Saver(const Saver&) = delete;

  // Finishes the save in flight, then writes `<folder>`, which must not exist. `before` is done first of all on the first rank, `after` last on each, by
  // the thread that writes.
  // Throws Error(kRuntime) naming the file and the system's reason, the same on all ranks. Nothing is left then, but where only the last flush failed,
  // of the folder that holds it: the checkpoint is there and whole, though a power cut may take it.
  void save(const std::filesystem::path& folder, const CheckpointState& state, const std::function<void()>& before = {}, const std::function<void()>& after = {});

  bool in_flight() const { return flight_.valid(); }       // until it was finished
  bool failed() const { return failed_; }                  // the save in flight has: finish() throws
  void wait() const;                                       // for the save in flight, which may fail
  void finish();                                           // the same, and throws what it failed of

 private:
  // What a save reads: the store's own tensors, or the copy.
  struct Tensors {
    std::map<std::string, Flat> flats;  // "" are the masters, others are moments by slot
    std::map<std::string, at::Tensor> buffers;
  };
  bool writes_parameters() const;  // ranks of other replicas hold the same
  bool writes_buffers() const;
  Tensors tensors();
  void write(const std::filesystem::path& folder, const CheckpointState& state, const Tensors& tensors, const std::function<void()>& before) const;

  const Config& config_;
  const Registry& registry_;
  Store& store_;
  Optimizer* optimizer_;
  const bool in_background_;
  std::map<std::string, std::map<const FlatGroup*, at::Tensor>> copies_;
  std::atomic<bool> failed_ = false;
  std::future<void> flight_;
};

// A checkpoint whose tensors come from somewhere else: `write_tensors` fills the folder that it is given with model.safetensors[...]. One process's.
void save_checkpoint_files(const std::filesystem::path& folder, const Config& config, const Registry& registry, const CheckpointState& state,
                           const std::function<void(const std::filesystem::path&)>& write_tensors);

}  // namespace tessera
