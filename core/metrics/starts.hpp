// starts.jsonl of a run folder: one line each time that training starts or goes on, with what computed from there.
#pragma once
#include <nlohmann/json.hpp>

#include <filesystem>

namespace tessera {

// This program and this machine: time (UTC), version, build, host, cpu, cores, memory_bytes.
nlohmann::json describe_start();
void append_start(const std::filesystem::path& file, const nlohmann::json& start);

}  // namespace tessera
