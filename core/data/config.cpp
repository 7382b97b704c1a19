#include "data/config.hpp"

#include <fmt/format.h>

#include "data/tasks/task.hpp"

namespace tessera {

namespace {

template <class Config>
void source_fields(Schema<Config>& schema, std::vector<std::string> kinds, const std::string& also = "") {
  schema.field("source", &Config::source, "Kind of the source: bytes (a file is a document, its bytes are the tokens), jsonl, megatron, random" + also + ".")
      .choices(std::move(kinds));
  schema.field("path", &Config::path,
               "bytes, jsonl: a file or a glob, ** for any folders; megatron: the files' common prefix. {libtorch} is libtorch's include folder.");
  schema.field("text_field", &Config::text_field, "jsonl: the field that holds the text, whose bytes are the tokens.");
  schema.field("document_len", &Config::document_len, "random: length of every document.").unit("tokens").range(0);
}

// An element of a list is keyed with its place in the list.
template <class Config>
void check_source(const Config& config, const std::string& prefix, Issues& issues) {
  const bool needs_path = config.source == "bytes" || config.source == "jsonl" || config.source == "megatron";
  if (needs_path && config.path.empty())
    issues.add(prefix + "path", fmt::format("must be given for source '{}'", config.source), "source = \"random\" needs no files");
  if (!needs_path && !config.path.empty())
    issues.add(prefix + "path", fmt::format("has no effect with source '{}', got '{}'", config.source, config.path), "remove it");
  if (config.source != "jsonl" && config.text_field != "text")
    issues.add(prefix + "text_field", fmt::format("has no effect with source '{}', got '{}'", config.source, config.text_field), "remove it");
  if (config.source == "random" && config.document_len < 1)
    issues.add(prefix + "document_len", fmt::format("must be at least 1 for source 'random', got {}", config.document_len));
  if (config.source != "random" && config.document_len != 0)
    issues.add(prefix + "document_len", fmt::format("has no effect with source '{}', got {}", config.source, config.document_len), "remove it");
}

}  // namespace

Schema<DataConfig> data_schema() {
  Schema<DataConfig> schema;
  std::vector<std::string> kinds{"bytes", "jsonl", "megatron", "random", "mixture"};
  for (const Task& task : tasks()) kinds.push_back(task.name);
  source_fields(schema, std::move(kinds), ", mixture; or a task, whose documents [data.task] describes");
  schema.field("validation_fraction", &DataConfig::validation_fraction, "Share of the documents that is held out for validation.").range(0, 0.5);
  schema.field("seed", &DataConfig::seed, "Of the order of documents, of the choice of held-out ones, and of random tokens.").range(0, 0x1p63);
  return schema;
}

Schema<DataComponent> data_component_schema() {
  Schema<DataComponent> schema;
  source_fields(schema, {"bytes", "jsonl", "megatron", "random"});
  schema.field("weight", &DataComponent::weight, "Share of the tokens, relative to the other components.").above(0);
  return schema;
}

void check_data(const DataConfig& config, Issues& issues) {
  check_source(config, "", issues);
  if (config.source == "mixture" && config.mixture.empty())
    issues.add("mixture", "must have at least one [[data.mixture]] table for source 'mixture', got none");
  if (config.source != "mixture" && !config.mixture.empty())
    issues.add("mixture", fmt::format("has no effect with source '{}', got {} tables", config.source, config.mixture.size()),
               "set source = \"mixture\"");
  for (size_t i = 0; i < config.mixture.size(); ++i) check_source(config.mixture[i], fmt::format("mixture[{}].", i), issues);
  if (const Task* task = find_task(config.source)) {
    Issues own;
    check_task(*task, config.task, own);
    for (const Issue& issue : own.list()) issues.add("task." + issue.key, issue.rule, issue.help);
  }
}

}  // namespace tessera
